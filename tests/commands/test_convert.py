# SPDX-License-Identifier: Apache-2.0
"""``manyheads convert``: what it writes is a model that every verb takes, and it says what it cost."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from manyheads import UserError, models, parse
from manyheads.cli import main
from manyheads.converter import Material, convert_model
from manyheads.data.texts import Text
from manyheads.integrations.bidirectional import is_bidirectional
from manyheads.models.text_encoder import TextEncoder
from manyheads.recipes.text_encoder import main as recipe


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    place = tmp_path_factory.mktemp("text") / "code.py"
    place.write_text("\n".join(f"def area_{i}(width, height):\n    return width * height + {i}\n" for i in range(60)))
    return place


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(list(map(str, arguments)))
    said = capsys.readouterr()
    return end.value.code, said.out, said.err


def small(text, out, *more):
    return ("convert", *more, "--text", text, "--out", out, "--length", 16, "--sequences", 2)


def test_a_plain_checkpoint_is_written_and_loaded(text, tmp_path, capsys):
    out = tmp_path / "made"
    spec = "minitron:keep=0.8,axis=neurons,correct=0.5"
    code, said, _ = run(capsys, *small(text, out, spec, "--recover", "2 steps", "--json"))
    assert code == 0
    found = json.loads(said)
    assert found["plain"] and found["parameters"]["after"] <= 0.8 * found["parameters"]["before"]
    assert set(found["losses"]) == {"before", "after surgery", "after recovery"} and found["recovery"]["steps"] == 1
    stock = AutoModelForCausalLM.from_pretrained(out)
    ours, tokenizer = models.load(out)
    ids = tokenizer("def area(width", return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.equal(stock.eval()(ids).logits, ours(ids).logits)
    assert sum(p.numel() for p in ours.parameters()) == found["parameters"]["after"]
    assert not (out / "training").exists() and any("compare" in line for line in found["next"])


def test_a_ragged_one_is_loaded_by_us(text, tmp_path, capsys):
    model, tokenizer = models.load_default()
    from manyheads.conversion import Drop, SurgeryPlan
    from manyheads.integrations.surgery import converted
    from manyheads.integrations.surgery_files import save

    plan = SurgeryPlan((Drop(part="attention", layers=(3,)),))
    cut = converted(model, plan)
    assert not save(cut, tmp_path, plan, model.config, {})
    tokenizer.save_pretrained(tmp_path)
    again, _ = models.load(tmp_path)
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, cut(ids).logits)
    code, said, _ = run(capsys, "inspect", "--model", tmp_path, "--text", text, "--lens", "sinks", "--length", 32,
                        "--samples", 1, "--out", tmp_path / "page", "--json")  # fmt: skip
    assert code == 0 and json.loads(said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("snapkv",), "no conversion"), (("minitron:keep=7",), "shares"), (("nothing",), "unknown strategy"),
        (("minitron", "--recover", "soon"), "write for instance 10m"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_a_line(text, tmp_path, capsys, arguments, said):
    code, _, error = run(capsys, *small(text, tmp_path / "x", *arguments))
    assert code == 2 and said in error and len(error.strip().splitlines()) == 1


def test_an_encoder_is_made_and_trained_from_the_command_line(text, tmp_path, capsys):
    made, trained, examples = tmp_path / "made", tmp_path / "trained", tmp_path / "examples.tsv"
    code, said, _ = run(capsys, "convert", "gemma_encoder", "--out", made, "--json")
    found = json.loads(said)
    assert code == 0 and found["bidirectional"] and is_bidirectional(TextEncoder.load(made).model)
    code, said, _ = run(capsys, "convert", "gemma_encoder:mask=causal,pooler=query", "--out", tmp_path / "other")
    assert code == 0 and "see what is before them" in said and "SentenceTransformer" in said
    code, _, error = run(capsys, "convert", "gemma_encoder", "--out", made, "--recover", "2 steps")
    assert code == 2 and "trained on a task" in error and len(error.strip().splitlines()) == 1
    examples.write_text("".join(f"def f{i}\tdefinition\n{i} + {i}\tsum\n" for i in range(4)))
    options = [
        "--encoder",
        made,
        "--train",
        examples,
        "--out",
        trained,
        "--budget",
        "3",
        "--batch",
        4,
        "--parts",
        "head",
    ]
    assert recipe([str(option) for option in options]) == 0
    assert TextEncoder.load(trained).predict(["x + 1"]).shape == (1, 2)
    assert json.loads((trained / "encoder.json").read_text())["about"]["classes"] == ["definition", "sum"]
    examples.write_text("def f\n")
    assert recipe([str(option) for option in options]) == 1
    assert "line 1 has not the 2 cells" in capsys.readouterr().err


def test_conversions_are_no_strategies_of_a_comparison(capsys):
    code, _, error = run(capsys, "compare", "--strategies", "minitron")
    assert code == 2 and "manyheads convert minitron" in error


def test_too_little_text_is_refused_and_the_model_stays():
    model, tokenizer = models.load_default()
    with pytest.raises(UserError, match="give more --text"):
        Material.of([Text("a", "x = 1\n" * 5)], tokenizer, 512)
    material = Material.of([Text("a", "x = 1\n" * 300)], tokenizer, 16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = convert_model(model, parse("structured_pruning:score=random,keep=0.8,axis=layers"), material, sequences=2)
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert made.losses["after surgery"] > made.losses["before"]
    assert len(made.model.model.layers) < len(model.model.layers)
