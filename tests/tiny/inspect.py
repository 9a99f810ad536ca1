# SPDX-License-Identifier: Apache-2.0
"""A tiny model with a tokenizer and a chat template, and what a probe and the doctor see in it."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyheads.cli import main
from manyheads.data.texts import Text, standard_library

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def texts():
    return standard_library()[:12]


def make_tokenizer(texts):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([text.content[:20_000] for text in texts[:4]], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="session")
def tokenizer(texts):
    return make_tokenizer(texts)


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="session")
def folder(model, tokenizer, tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


@pytest.fixture(scope="session")
def evil():
    """Text that would like to be markup."""
    line = "<script>alert('x')</script> & <b onclick=\"x()\">bold</b> </textarea><!-- \u2028 \x07 ]]> café\n"
    return [Text("<script>bad</script>.py", line * 60)]


@pytest.fixture(scope="session")
def seen(model, tokenizer, texts):
    from manyheads.inspect.run import inspect_model

    return inspect_model(
        model, tokenizer, texts, ["sinks", "massive", "rhythm", "spans:system=0-9"], length=96, samples=2, ablate="sink"
    )  # fmt: skip


@pytest.fixture(scope="session")
def found(model, tokenizer, texts):
    from manyheads.inspect.doctor import diagnose

    return diagnose(model, tokenizer, texts, length=96, samples=2)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run
