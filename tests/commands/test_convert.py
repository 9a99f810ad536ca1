# SPDX-License-Identifier: Apache-2.0
"""``manyheads convert``: what it writes is a model that every verb takes, and it says what it cost."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from manyheads import UserError, models, parse
from manyheads.cli import main
from manyheads.commands.convert import _following
from manyheads.conversion import Prune, SurgeryPlan
from manyheads.converter import Material, convert_model
from manyheads.data.texts import Text
from manyheads.integrations.bidirectional import is_bidirectional
from manyheads.integrations.surgery import converted
from manyheads.models.text_encoder import TextEncoder
from manyheads.recipes.text_encoder import main as recipe
from manyheads.training import recovery
from oracles import conversions


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
    from manyheads.conversion import Drop
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


def test_models_are_not_written_over(text, tmp_path, capsys):
    """What a conversion wrote there before is."""
    mine, out = tmp_path / "mine", tmp_path / "out"
    for part in models.load_default():
        part.save_pretrained(mine)
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    spec = "structured_pruning:score=magnitude,axis=layers"
    code, _, error = run(capsys, *small(text, mine, spec, "--model", mine))
    assert code == 2 and "holds a model" in error
    assert before == {path.name: path.read_bytes() for path in mine.iterdir()}
    for _ in range(2):
        assert run(capsys, *small(text, out, spec, "--model", mine))[0] == 0
    code, _, error = run(capsys, *small(text, out, spec, "--model", out))
    assert code == 2 and "holds a model" in error


@pytest.mark.parametrize("first", [(), (7,)])
def test_windows_begin_as_the_tokenizer_begins_a_text(first):
    """Gemma without its <bos> sees nothing like what it was trained on, nor does what is calibrated on it."""
    tokenizer = SimpleNamespace(
        encode=lambda text, add_special_tokens=True, **_: [*(first if add_special_tokens else ()), *map(ord, text)]
    )
    material = Material.of([Text("a", "".join(chr(100 + i % 20) for i in range(400)))], tokenizer, 16)
    rows = [*material.calibration(4, 2, "cpu"), material.held_out, material.batches(3, 0, "cpu")(1)]
    for row in torch.cat([x[:, :16] for x in rows]):
        assert tuple(row[: len(first)].tolist()) == first and (row[len(first) :] >= 100).all()
    assert material.held_out.shape[1] == 17 and (material.train >= 100).all()


@pytest.mark.parametrize(("spec", "plain"), [("comcat:keep=0.5,mlp=0.6", False), ("comcat:ranks=uniform", True)])
def test_a_vision_transformer_is_given_images(spec, plain, tmp_path, capsys):
    from PIL import Image

    vit, folder, out = tmp_path / "vit", tmp_path / "images", tmp_path / "out"
    conversions.tiny("vit").float().save_pretrained(vit)
    folder.mkdir()
    for i in range(6):
        Image.effect_noise((20, 20), 40 + 10 * i).convert("RGB").save(folder / f"{i}.png")
    given = ("convert", spec, "--model", vit, "--out", out)
    code, said, _ = run(capsys, *given, "--image", folder, "--recover", "12 steps", "--json")
    found = json.loads(said)
    assert code == 0 and found["plain"] == plain and found["parameters"]["after"] < found["parameters"]["before"]
    losses = found["losses"]
    assert abs(losses["before"]) < 1e-6 < losses["after recovery"] < losses["after surgery"]
    model, _ = models.load_vision(out)
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]["after"]
    assert any("load_vision" in line or "AutoModel" in line for line in found["next"])
    for more, said in ((("--image", folder / "0.png"), "twice"), (("--image", folder, "--text", folder), "give one")):
        code, _, error = run(capsys, *given, *more)
        assert code == 2 and said in error


def test_a_folder_is_what_was_made_last(text, tmp_path, capsys):
    """Of an encoder's files none outlasts a conversion into its folder, nor the other way round."""
    out, ragged = tmp_path / "out", "skip_attn:skip=0.2"
    assert run(capsys, *small(text, out, ragged))[0] == 0
    assert run(capsys, "convert", "pooling:latents=2,heads=1", "--out", out)[0] == 0
    encoder = TextEncoder.load(out)
    assert len(encoder.model.layers) == len(models.load_default()[0].model.layers)
    assert all(type(layer.self_attn).__name__ == "LlamaAttention" for layer in encoder.model.layers)
    assert not list(out.glob("surgery.*")) and not (out / "conversion.json").exists()
    assert run(capsys, *small(text, out, ragged))[0] == 0
    left = {path.name for path in out.iterdir()}
    assert not left & {"encoder.json", "modules.json", "sentence_bert_config.json", "1_Pooling", "2_Normalize"}
    with pytest.raises(UserError, match="no encoder of texts"):
        TextEncoder.load(out)


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


@pytest.mark.slow
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


def material(length=16):
    _, tokenizer = models.load_default()
    return Material.of([Text("a", "x = 1\n" * 600)], tokenizer, length)


def tiny(kind, **changed):
    return conversions.tiny(kind, vocab_size=8192, **{"num_hidden_layers": 4} | changed).float()


NARROW = "structured_pruning:score=magnitude,axis=layers,keep=0.98"


def test_a_recovery_that_was_cut_off_goes_on_with_its_own_conversion_alone(tmp_path):
    """Weights of another cut of the same shapes, or of another text, fit and mean nothing."""
    model, place = tiny("llama"), tmp_path / "training"

    class Stopped(Exception):
        pass

    def stop(done, total, what):
        if what.endswith("step 2"):
            raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "_SECONDS", 0.0)  # a checkpoint after every step
        with pytest.raises(Stopped):
            convert_model(model, NARROW, material(), recover="3 steps", folder=place, progress=stop)
    assert list(place.glob("*/step-*"))
    others = {"spec": "structured_pruning:score=random,axis=layers,keep=0.98,seed=3", "text": NARROW, "seed": NARROW}
    for what, spec in others.items():
        given = material(12) if what == "text" else material()
        with pytest.raises(UserError, match="another training"):
            convert_model(model, spec, given, recover="3 steps", folder=place, seed=5 if what == "seed" else 0)
    steps = []
    made = convert_model(
        model, NARROW, material(), recover="3 steps", folder=place, progress=lambda *said: steps.append(said[2])
    )
    assert "recovery, step 1" not in steps and made.state.step == 3 and not place.exists()


def test_a_folder_of_another_kind_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="another training"):
        convert_model(tiny("llama"), NARROW, material(), recover="1 steps", folder=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_encoders_of_another_width_are_not_compared_and_not_trained(capsys):
    model, spec = tiny("bert"), "minitron:axis=width,keep=0.9"
    made = convert_model(model, spec, material(), sequences=2)
    assert set(made.losses) == {"before"} and "NaN" not in json.dumps(made.document())
    with pytest.raises(UserError, match="axis=neurons"):
        convert_model(model, spec, material(), sequences=2, recover="1 steps")


def test_what_is_said_of_an_encoder_can_be_done(text, tmp_path, capsys):
    _, tokenizer = models.load_default()
    for part in (tiny("bert"), tokenizer):
        part.save_pretrained(tmp_path / "bert")
    spec, out = "minitron:keep=0.9,axis=width", tmp_path / "it is out"
    code, said, _ = run(capsys, *small(text, out, spec, "--model", tmp_path / "bert", "--json"))
    following = json.loads(said)["next"]
    assert code == 0 and not any("compare" in line or "--recover" in line for line in following)
    assert f"inspect --model '{out}'" in following[0] and "load_reader" in following[1]
    assert sum(p.numel() for p in models.load_reader(out)[0].parameters()) == json.loads(said)["parameters"]["after"]
    assert "another width" in run(capsys, *small(text, out, spec, "--model", tmp_path / "bert"))[1]


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_encoders_are_converted_with_their_heads(kind):
    """Norms of a head are none of the stream."""
    config = tiny("bert").config
    made = convert_model(getattr(transformers, kind)(config), "minitron:axis=layers,keep=0.98", material(), sequences=2)
    assert made.losses["after surgery"] > 0


def test_what_a_model_cannot_read_or_was_cut_by_a_plan_is_refused():
    with pytest.raises(UserError, match="64 tokens at most"):
        convert_model(tiny("gpt2"), NARROW, material(65))
    sizes = {name: getattr(tiny("bert").config, name) for name in ("vocab_size", "hidden_size", "num_attention_heads")}
    config = transformers.RobertaConfig(
        **sizes, num_hidden_layers=4, intermediate_size=40, max_position_embeddings=34, pad_token_id=1
    )
    roberta = transformers.RobertaModel(config).eval()
    with pytest.raises(UserError, match="32 tokens at most"):  # its positions begin behind that of padding
        convert_model(roberta, NARROW, material(33))
    assert convert_model(roberta, NARROW, material(32)).losses
    cut = converted(tiny("gpt2"), SurgeryPlan((Prune(axis="width", keep=tuple(range(42))),)))
    with pytest.raises(UserError, match="one that it was made of"):
        convert_model(cut, NARROW, material())


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


def test_only_commands_that_work_are_suggested():
    """A model without attention that a strategy can act on is neither compared nor inspected."""
    for model, verbs in ((conversions.tiny("llama"), 2), (torch.nn.Linear(1, 1), 0)):
        made = SimpleNamespace(measure="nats/token", compared=True, model=model)
        lines = _following(made, Path("there"), True, "10m")
        assert sum(line.startswith("manyheads ") for line in lines) == verbs and "from_pretrained" in lines[-1]
