# SPDX-License-Identifier: Apache-2.0
"""The verbs `inspect` and `doctor` as they are typed."""

import json
import re

import pytest

from manyheads.heads import HeadTable
from tiny import inspect as tiny

texts, tokenizer, model, folder, evil, seen, found, cli = (
    tiny.texts, tiny.tokenizer, tiny.model, tiny.folder, tiny.evil, tiny.seen, tiny.found, tiny.cli
)  # fmt: skip

SMALL = ["--length", "80", "--samples", "2"]


def test_probe(cli, folder, tmp_path):
    code, out, err = cli("inspect", "--model", str(folder), *SMALL, "--ablate", "first token")
    assert code == 0 and "sink" in out and "waad" not in out and "manyheads-inspect/inspect.html" in out
    assert "reading" in err and "Without the" in out and "random heads of the same layers" in out
    document = json.loads((tmp_path / "manyheads-inspect" / "findings.json").read_text())
    assert set(document["findings"]) == {
        "active_dormant", "massive_values", "refined_massive_activations", "reasoning_rhythm", "attention",
    }  # fmt: skip
    assert document["ablation"]["score"] == "attention/first token" and document["run"]["command"][0] == "manyheads"
    assert cli("inspect", "--model", str(folder), *SMALL, "--lens", "sinks")[0] == 0
    assert (tmp_path / "manyheads-inspect-2" / "inspect.html").exists()


def test_json_is_all_that_is_printed(cli, folder, tmp_path):
    base = ("--model", str(folder), *SMALL, "--json", "--out", "x")
    code, out, err = cli("inspect", *base, "--lens", "spans:system=0-7", "--layers", "0")
    document = json.loads(out)
    assert code == 0 and err == "" and document["prompts"][0]["roles"] == {"system": [[0, 7]]}
    made = HeadTable.from_dict(document["findings"]["strategy_attention:layers=0"]["tables"]["lift"])
    assert made.values.shape == (2, 1, 4) and (tmp_path / "x" / "findings.json").read_text() == out
    code, out, err = cli("doctor", *base, "--quick")
    assert (
        code == 0
        and err == ""
        and {s["level"] for s in json.loads(out)["checks"]} <= {"watch", "note", "fine", "unknown"}
    )


def test_doctor(cli, folder, tmp_path):
    code, out, _ = cli("doctor", "--model", str(folder), *SMALL, "--quick")
    assert code == 0 and "padding leaks" in out and "threshold" in out and "manyheads-doctor/doctor.html" in out
    assert (tmp_path / "manyheads-doctor" / "findings.json").exists()


def test_the_doctor_reads_a_chat(cli, folder, tmp_path):
    said = "You are a careful person who says what is known and nothing else. " * 4
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": said}]))
    code, out, err = cli("doctor", "--model", str(folder), "--chat", "chat.json", "--quick", "--json")
    assert code == 0, err
    assert json.loads(out)["run"]["sources"] == ["chat.json"]
    assert cli("doctor", "--model", str(folder), "--chat", "chat.json", "--text", "chat.json")[0] == 2
    (tmp_path / "chat.json").write_text(json.dumps([{"role": "user", "content": "Why does it say so, and when?"}]))
    code, _, err = cli("doctor", "--model", str(folder), "--chat", "chat.json", "--quick")
    assert code == 2 and "too short" in err


def test_chat_and_answer(cli, folder, tmp_path):
    messages = [{"role": "system", "content": "You are a careful person."}, {"role": "user", "content": "What is it?"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    code, out, err = cli(
        "inspect", "--model", str(folder), "--chat", "chat.json", "--generate", "4", "--lens", "spans", "--json"
    )
    assert code == 0, err
    roles = json.loads(out)["prompts"][0]["roles"]
    assert set(roles) == {"system", "user", "response"} and roles["response"][0][0] > roles["user"][0][1]


def test_text_with_a_role(cli, folder, tmp_path):
    (tmp_path / "p.txt").write_text("Be brief and kind. " + "Then it rained for days on end. " * 30)
    code, out, err = cli(
        "inspect", "--model", str(folder), "--text", "p.txt", "--role", "system=Be brief and kind.", "--lens", "spans",
        "--length", "60", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["prompts"][0]["roles"]["system"][0][0] == 0


def test_questions(cli, folder, tmp_path):
    """A random model is right where nothing can be wrong; with a part of a text the lens looks as any other."""
    rows = [{"question": f"What is it, number {i}?", "answers": ["it"] if i % 2 else []} for i in range(60)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    base = ("inspect", "--model", str(folder), "--lens", "hallucination_risk")
    code, out, err = cli(*base, "--questions", "q.json", "--risk", "0.6")
    assert code == 0, err
    assert "50 % of 60 answers are wrong" in out and "source mass" in out and "Clopper-Pearson" in out
    document = json.loads((tmp_path / "manyheads-inspect" / "findings.json").read_text())
    assert document["run"]["settings"]["risk"] == 0.6 and len(document["answers"]) == 60
    assert "wrong among them" in (tmp_path / "manyheads-inspect" / "inspect.html").read_text()
    code, out, err = cli(*base[:-1], "hallucination_risk:source=0-9", *SMALL, "--generate", "3", "--json")
    assert code == 0, err
    assert set(json.loads(out)["findings"]["hallucination_risk"]["tables"]) == {"source mass", "lookback"}


BAD = [
    (["--lens", "snaks"], "did you mean sinks"),
    (["--lens", "snapkv"], "does not only look"),
    (["--lens", "sinks:nonsense=3"], "nonsense"),
    (["--lens", "sinks:threshold=x"], "threshold=x"),
    (["--lens", "massive:foo=1"], "no field 'foo'"),
    (["--lens", "massive_values:damage=top"], "acts on the model"),
    (["--lens", "spans"], "--role system="),
    (["--lens", "spans:system=0-900"], "raise --length"),
    (["--lens", "spans:system=5-5"], "holds no token"),
    (["--role", "system"], "is no role"),
    (["--role", "system=1-"], "START-END"),
    (["--role", "system=no such words are here"], "no text holds"),
    (["--role", "system=0-900"], "raise --length"),
    (["--text", "short.txt"], "too short"),
    (["--text", "missing.txt"], "no such file"),
    (["--text", "two.txt", "--length", "200"], "too short"),
    (["--length", "4"], "at least 8 tokens"),
    (["--length", "100000"], "too long"),
    (["--layers", "0-9"], "layers 0 to 1"),
    (["--layers", "a"], "write them as 0-3\\+7"),
    (["--ablate", "snik"], "no score of heads"),
    (["--chat", "missing.json"], "no such file"),
    (["--chat", "short.txt"], "is no JSON"),
    (["--chat", "bad.json"], "write messages"),
    (["--chat", "good.json", "--text", "two.txt"], "not both"),
    (["--chat", "good.json", "--role", "system=0-2"], "leave --role away"),
    (["--model", "missing/folder/deep"], "no such folder"),
    (["--device", "gpu0"], "unknown device"),
    (["--dtype", "int8"], "use float32, bfloat16, float16"),
    (["--device", "mps"], "this torch cannot use it"),
    (
        ["--lens", "active_dormant:layers=9"],
        "active_dormant:layers=9 finds no attention to look at in LlamaForCausalLM",
    ),
    (["--lens", "sinks,massive_values:layers=9", "--generate", "4"], "causal self attention in layers 0 to 1"),
    (["--out", "short.txt/x"], "cannot write"),
    (["--risk", "0.3"], "--risk is for questions"),
    (["--lens", "hallucination_risk", "--generate", "4"], "--generate is not for questions"),
    (["--lens", "hallucination_risk,sinks"], "--lens of another kind is not for questions"),
    (["--lens", "hallucination_risk"], "passages that end with a name"),
    (["--questions", "good.json"], "write questions as"),
    (["--questions", "missing.json"], "no such file"),
    (["--questions", "few.json"], "0 of 1 answers are wrong"),
]


@pytest.mark.parametrize(("options", "word"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(cli, folder, tmp_path, options, word):
    (tmp_path / "short.txt").write_text("a b")
    (tmp_path / "two.txt").write_text("a few words more than two of them, but not many")
    (tmp_path / "bad.json").write_text('[{"role": "user"}]')
    (tmp_path / "good.json").write_text('[{"role": "user", "content": "hello there, what is the matter with it?"}]')
    (tmp_path / "few.json").write_text('[{"question": "Who is it?", "answers": []}]')
    before = sorted(p.name for p in tmp_path.iterdir())
    model = [] if "--model" in options else ["--model", str(folder)]
    asks = "--questions" in options or any("hallucination_risk" in option for option in options)
    small = [] if "--length" in options or asks else ["--length", "80"]
    given = [] if {"--text", "--chat", "--questions"} & set(options) else ["--text", str(folder / "config.json")]
    out = [] if "--out" in options else ["--out", "out"]
    code, printed, err = cli("inspect", *model, "--samples", "1", *small, *given, *out, *options)
    last = err.strip().splitlines()[-1]
    assert code == 2 and printed == "" and last.startswith("error: ") and re.search(word, last), err
    assert "Traceback" not in err and sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_doctor_refuses_too(cli, folder, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    for options, word in ((["--text", "short.txt"], "too short"), (["--length", "9"], "32 tokens")):
        code, out, err = cli("doctor", "--model", str(folder), *options)
        assert code == 2 and out == "" and word in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "manyheads-doctor").exists()


SIZES = {
    "vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": 600, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
READERS = {
    "Bert Model": (SIZES, 2), "Bert ForMaskedLM": (SIZES, 2), "Roberta Model": (SIZES, 2),
    "Albert Model": ({**SIZES, "num_hidden_layers": 5, "embedding_size": 16}, 5), "Bart ForConditionalGeneration":
    (SEQ2SEQ, 2), "Llama Model": ({**SIZES, "num_key_value_heads": 2}, 2),
}  # fmt: skip


ALIKE = ("Albert Model", "Bert ForMaskedLM", "Roberta Model")  # encoders read like "Bert Model"


def saved(name, sizes, tokenizer, place):
    import torch
    import transformers

    family, kind = name.split()
    torch.manual_seed(0)
    model = getattr(transformers, family + kind)(getattr(transformers, f"{family}Config")(**sizes))
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


@pytest.fixture
def framed(texts):
    """A tokenizer that puts a token before a text and one behind it."""
    from tokenizers import processors

    made = tiny.make_tokenizer(texts)
    frame = processors.TemplateProcessing(single="<s> $A <s>", special_tokens=[("<s>", 0)])
    made.backend_tokenizer.post_processor = frame
    made.model_max_length = 62
    return made


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in ("Bert ForMaskedLM", "Roberta Model", "Albert Model") else n
        for n in READERS
    ],
)
def test_models_that_read_text(cli, framed, tmp_path, name):
    """Text encoders, that of an encoder-decoder model, and decoders without a head: no loss, every layer."""
    sizes, count = READERS[name]
    place = saved(name, sizes, framed, tmp_path / "model")
    code, out, err = cli("inspect", "--model", place, "--samples", "2", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["loss"] is None and all(p["ids"][0] == 0 for p in document["prompts"])
    assert all(len(p["ids"]) == 62 and (p["ids"][-1] == 0) for p in document["prompts"])
    sink = HeadTable.from_dict(document["findings"]["active_dormant"]["tables"]["sink"])
    assert sink.values.shape == (2, count, 4) and sink.layers == tuple(range(count))
    assert ("reasoning_rhythm" in document["findings"]) == (name == "Llama Model")
    notes = document["findings"]["attention"]["notes"]
    assert ("reasoning_rhythm finds nothing to look at here." in notes) == (name != "Llama Model")
    if name not in ("Bert Model", "Llama Model"):  # what follows is alike for all
        return
    code, out, err = cli("inspect", "--model", place, "--samples", "1", "--out", "y")
    assert code == 0 and "loss" not in out
    asks = (["--lens", "gender_components"], "asks for the next token")
    for options, word in ((["--ablate", "sink"], "has no loss"), (["--generate", "3"], "predicts no text"), asks):
        assert word in cli("inspect", "--model", place, *options)[2]
    if name != "Llama Model":
        assert "finds no attention to look at" in cli("inspect", "--model", place, "--lens", "rhythm")[2]
        assert "no causal language model" in cli("doctor", "--model", place)[2]


VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14,
    "intermediate_size": 64,
}  # fmt: skip
WHISPER = {
    **{key: value for key, value in SEQ2SEQ.items() if key != "max_position_embeddings"}, "num_mel_bins": 8,
    "max_source_positions": 50, "max_target_positions": 12,
}  # fmt: skip


def files(place):
    """An image and a recording."""
    import wave

    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8)).save(place / "a.png")
    with wave.open(str(place / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(random.integers(-9999, 9999, 8000).astype("<i2").tobytes())


def test_images(cli, framed, tmp_path):
    files(tmp_path)
    place = saved("ViT Model", VIT, framed, tmp_path / "model")
    code, out, err = cli("inspect", "--model", place, "--image", "a.png", "--image", "a.png", "--out", "x")
    assert code == 0, err
    assert "patches farther away" in out and "reasoning_rhythm finds nothing" in out and "loss" not in out
    page = (tmp_path / "x" / "inspect.html").read_text()
    assert page.count('class="heat"') == 2 * 9 and "a.png, as the model sees it" in page and "row 1, column 0" in page
    document = json.loads((tmp_path / "x" / "findings.json").read_text())
    assert document["tokens"][0] == ["class token", *(f"row {r}, column {c}" for r in (0, 1) for c in (0, 1))]
    sink = HeadTable.from_dict(document["findings"]["active_dormant"]["tables"]["sink"])
    assert sink.values.shape == (2, 2, 4) and sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        "findings.json", "inspect.html",
    ]  # fmt: skip


def test_recordings(cli, framed, tmp_path):
    import transformers

    files(tmp_path)
    place = saved("Whisper ForConditionalGeneration", WHISPER, framed, tmp_path / "model")
    assert "preprocessor_config.json" in cli("inspect", "--model", place, "--audio", "a.wav")[2]
    transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(place)
    code, out, err = cli("inspect", "--model", place, "--audio", "a.wav", "--json", "--out", "x")
    assert code == 0 and err == "", err
    document = json.loads(out)
    assert document["encoder"]["tokens"][0][1] == "0.02 s" and len(document["losses"][0]) == len(document["tokens"][0])
    assert set(document["cross"]["findings"]["attention"]["tables"]) == {
        "the recording", "silence behind the recording", "entropy",
    }  # fmt: skip
    assert "What each token listens to" in (tmp_path / "x" / "inspect.html").read_text()
    assert (tmp_path / "x" / "cross.html").exists() and "0.2 s around it" in (
        tmp_path / "x" / "encoder.html"
    ).read_text()


NOT_FOR_SIGNALS = [
    (["--image", "a.png", "--audio", "a.wav"], "--image beside --audio"),
    (["--image", "a.png", "--length", "9"], "--length"),
    (["--image", "a.png", "--ablate", "sink"], "--ablate is not for images"),
    (["--audio", "a.wav"], "leave --audio away"),
    (["--image", "a.png", "--lens", "spans:system=0-3"], "parts of a text"), (["--image", "none.png"], "no such file"),
    (["--image", "a.png", "--lens", "rhythm"], "no attention to look at"), (["--image", "."], "cannot be read"),
    (["--image", "a.wav"], "no image that can be read"), (["--image", "a.png", "--layers", "5"], "0 to 1"),
    ([], "give --image FILE"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "word"), NOT_FOR_SIGNALS, ids=[" ".join(options) for options, _ in NOT_FOR_SIGNALS]
)
def test_what_images_and_recordings_have_not(cli, framed, tmp_path, options, word):
    files(tmp_path)
    place = saved("ViT Model", VIT, framed, tmp_path / "model")
    code, out, err = cli("inspect", "--model", place, "--out", "x", *options)
    last = err.strip().splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("error: ") and word in last and not (tmp_path / "x").exists()


def test_a_model_of_the_other_kind(cli, folder, framed, tmp_path):
    files(tmp_path)
    for option, word in (("--image", "it reads text"), ("--audio", "it reads text")):
        assert word in cli("inspect", "--model", str(folder), option, f"a.{'png' if option == '--image' else 'wav'}")[2]
    assert "name a model" in cli("inspect", "--image", "a.png")[2]
    place = saved("Whisper Model", WHISPER, framed, tmp_path / "model")
    assert "give --audio FILE" in cli("inspect", "--model", place)[2]
