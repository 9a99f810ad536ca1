# SPDX-License-Identifier: Apache-2.0
"""The model of lm-eval: full is lm-eval's own, a compressing strategy is not, and batches change nothing.

Skipped where lm-eval is not installed (``pip install "manyheads[lm-eval]"``).
"""

import json
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra [lm-eval]")

from lm_eval.models.huggingface import HFLM

import manyheads
from manyheads.errors import UserError
from manyheads.lm_eval import ManyHeadsLM, strategies_of
from tiny import inspect as tiny

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
doc_to_text: "{{{{context}}}} -> "
{kind}
"""
CHOICE = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}]
"""
UNTIL = """
output_type: generate_until
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_target: "{{context}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and three tasks on one file of data."""
    place, texts = tmp_path_factory.mktemp("harness"), tiny.standard_library()[:12]
    tokenizer = tiny.make_tokenizer(texts)
    tokenizer.chat_template = None
    tiny.make_model().save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    draw = random.Random(0)
    words = [word for word in texts[0].content.split() if word.isalpha()]
    rows = [
        {"context": " ".join(draw.choices(words, k=n)), "choices": draw.choices(words, k=3), "label": n % 3}
        for n in (30, 12, 45, 20, 33)
    ]
    (place / "data.json").write_text("\n".join(map(json.dumps, rows)))
    for name, kind in (("choice", CHOICE), ("until", UNTIL), ("rolling", ROLLING)):
        (place / f"{name}.yaml").write_text(TASK.format(name=name, data=place / "data.json", kind=kind))
    return place


def made(folder, strategy="", cls=ManyHeadsLM, **more):
    given = {"strategy": strategy} if cls is ManyHeadsLM else {}
    return cls(pretrained=str(folder / "model"), device="cpu", dtype="float32", **given, **more)


def scored(model, requests):
    return model.loglikelihood([SimpleNamespace(args=pair, task_name="some") for pair in requests], disable_tqdm=True)


@pytest.fixture(scope="module")
def requests(folder):
    rows = [json.loads(line) for line in (folder / "data.json").read_text().splitlines()]
    pairs = [(row["context"], f" {choice}") for row in rows for choice in row["choices"]]
    return [*pairs, ("", " import os"), (rows[0]["context"], " the class of a function with many words")]


def test_full_is_the_harness_itself(folder, requests):
    expected = scored(made(folder, cls=HFLM, batch_size=4), requests)
    for strategy in ("", "full"):
        found = scored(made(folder, strategy, batch_size=4), requests)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert torch.tensor(found).sub(torch.tensor(expected)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "strategy", ["knorm:budget=0.3", "snapkv:budget=0.3,window_size=4", "h2o:budget=0.3,schedule=step", "tova:budget=6"]
)
def test_batches_change_nothing(folder, requests, strategy):
    one, many = (scored(made(folder, strategy, batch_size=size), requests) for size in (1, 5))
    assert torch.tensor(one).sub(torch.tensor(many)).abs().max() < 1e-4
    plain = scored(made(folder, "full"), requests)
    differ = [abs(a - b) > 1e-3 for (a, _), (b, _) in zip(one, plain, strict=True)]
    assert all(d for d, (context, _) in zip(differ, requests, strict=True) if context)  # one token of continuation too
    if "step" not in strategy and "tova" not in strategy:  # those drop tokens while they decode, too
        assert not any(d for d, (context, _) in zip(differ, requests, strict=True) if not context)


def test_a_continuation_is_scored_as_it_would_be_decoded(folder, requests):
    """By hand: the context but its last token, the compressed cache, then one token after the other."""
    context, continuation = requests[-1]
    model = made(folder, "knorm:budget=0.3")
    read = model.tok_encode(context)
    wanted = model.tok_encode(context + continuation)[len(read) :]
    from manyheads.integrations.transformers import new_cache

    total = 0.0
    with torch.inference_mode(), manyheads.use(model.model):
        cache = new_cache(model.model, manyheads.parse("knorm:budget=0.3"))
        model.model(torch.tensor([read[:-1]]), past_key_values=cache)
        for last, target in zip([read[-1], *wanted], wanted, strict=False):
            logits = model.model(torch.tensor([[last]]), past_key_values=cache).logits[0, -1]
            total += float(logits.log_softmax(-1)[target])
    assert scored(model, [requests[-1]])[0][0] == pytest.approx(total, abs=1e-4)


def test_text_is_generated_as_under_use(folder):
    model, plain = made(folder, "streaming_llm:budget=0.2"), made(folder)
    text = json.loads((folder / "data.json").read_text().splitlines()[2])["context"]
    asked = [SimpleNamespace(args=(text, {"until": ["\n\n\n"], "max_gen_toks": 8}), task_name="some")]
    found = model.generate_until(asked, disable_tqdm=True)
    ids = torch.tensor([model.tok_encode(text)])
    with manyheads.use(plain.model, "streaming_llm:budget=0.2"):
        expected = plain.model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert found == [model.tok_decode(expected[0, ids.shape[1] :].tolist())]
    assert found != plain.generate_until(asked, disable_tqdm=True)


def test_other_strategies_act_in_the_one_forward(folder, requests):
    ablated, plain = scored(made(folder, "ablate:heads=0.0+0.1+1.2"), requests), scored(made(folder), requests)
    assert all(abs(a - b) > 1e-4 for (a, _), (b, _) in zip(ablated, plain, strict=True))
    both = scored(made(folder, "ablate:heads=0.0+0.1+1.2 + full"), requests)
    assert torch.tensor(both).sub(torch.tensor(ablated)).abs().max() < 1e-4


def test_command(folder, capsys, monkeypatch):
    """A task of one's own from a folder, through lm-eval's own command line."""
    from manyheads.cli import main

    def run(strategy, task, *more):
        out = folder / f"{task}-{strategy.partition(':')[0]}"
        with pytest.raises(SystemExit) as stop:
            main([
                "lm-eval", "--model_args", f"pretrained={folder / 'model'},dtype=float32,strategy={strategy}",
                "--tasks", task, "--include_path", str(folder), "--device", "cpu", "--log_samples",
                "--output_path", str(out), *more,
            ])  # fmt: skip
        if stop.value.code:
            return stop.value.code, capsys.readouterr().err
        (samples,) = out.rglob("samples_*.jsonl")
        return 0, [json.loads(line)["resps"] for line in samples.read_text().splitlines()]

    code, plain = run("full", "choice", "--batch_size", "4")
    assert code == 0 and len(plain) == 5
    code, compressed = run("snapkv:budget=0.3,window_size=4", "choice")
    assert code == 0 and compressed != plain
    assert run("knorm:budget=0.3", "until")[0] == 0
    code, said = run("knorm:budget=0.3", "rolling")
    assert code == 2 and "no context" in said and "perplexity" in said
    code, said = run("nonsense", "choice")
    assert code == 2 and "unknown" in said


def test_rolling_with_every_token_is_the_harness(folder):
    text = [SimpleNamespace(args=("import os and the class of a function",), task_name="some")]
    expected = made(folder, cls=HFLM).loglikelihood_rolling(text, disable_tqdm=True)
    found = made(folder, "full").loglikelihood_rolling(text, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)
    assert made(folder, "tova:budget=3").loglikelihood_rolling(text, disable_tqdm=True) != pytest.approx(
        expected, abs=1e-2
    )


def test_specs_that_the_harness_cut_at_commas():
    cut = {"window_size": 16, "kernel_size": 5, "revision": "main", "attn_implementation": "sdpa"}
    text, others = strategies_of("snapkv:budget=0.5", cut)
    assert text == "snapkv:budget=0.5,window_size=16,kernel_size=5"
    assert others == {"revision": "main", "attn_implementation": "sdpa"}
    text, others = strategies_of("graphkv:base=snapkv(window_size=16", {"kernel_size": "5)", "budget": 0.25})
    assert text == "graphkv:base=snapkv(window_size=16,kernel_size=5),budget=0.25" and not others
    assert strategies_of("auto", {"budget": 0.25}) == ("auto:budget=0.25", {})
    with pytest.raises(UserError, match="unknown"):
        strategies_of("snapkw", {"window_size": 3})
