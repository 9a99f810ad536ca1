# SPDX-License-Identifier: Apache-2.0
"""A tower and a decoder joined: the parts stay what they were, and what is trained comes back from its folder."""

import json

import pytest
import torch
import transformers

import manyheads
from manyheads.data import scenes
from manyheads.data.visual_questions import WORDS, Questions
from manyheads.models import joined_vlm
from manyheads.recipes import joined_vlm as recipe
from manyheads.training.answers import answer_logits, train_answers
from tiny.joined import make_parts, make_words
from tolerance import SAME, assert_close, is_far

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


def asked(vlm, rows=2, patches=2):
    """Questions without pictures of their own."""
    ids = [*vlm.language.start, *[vlm.language.image] * patches**2, *vlm.language.encode("is there a heart")]
    ids = torch.tensor([ids] * rows)
    images = torch.rand(rows, 3, patches * vlm.patch, patches * vlm.patch, generator=torch.Generator().manual_seed(0))
    return Questions(
        ids, torch.ones_like(ids).bool(), images * 2 - 1, torch.tensor([[ids.shape[1] - 1]] * rows),
        torch.tensor([[i % 2 == 0] for i in range(rows)]), torch.zeros(rows, 1, dtype=torch.long),
    )  # fmt: skip


def test_a_joined_model_is_its_decoder_where_there_is_no_image(parts):
    vlm = joined_vlm.join(*parts)
    alone = transformers.LlamaForCausalLM.from_pretrained(parts[1])
    ids = torch.tensor([vlm.language.encode("is there a heart")])
    with torch.no_grad():
        assert_close(vlm.model(input_ids=ids).logits, alone(input_ids=ids).logits, SAME)
        other = vlm.model(input_ids=ids.flip(1)).logits
    assert is_far(other, alone(input_ids=ids).logits, SAME)
    assert vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight
    trained = {name for name, p in vlm.model.named_parameters() if p.requires_grad}
    assert trained == {f"model.multi_modal_projector.linear_{i}.{x}" for i in (1, 2) for x in ("weight", "bias")}


def test_pixels_are_those_that_the_tower_was_trained_on(parts):
    vlm = joined_vlm.join(*parts)
    batch = vlm.batch(asked(vlm))
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert_close(batch["pixel_values"] * std + mean, asked(vlm).images / 2 + 0.5, SAME)
    small = joined_vlm.small(patches=2, size=2, dim=16, layers=1)
    assert torch.equal(small.batch(asked(small))["pixel_values"], asked(small).images)
    no, yes = vlm.language.answers
    assert batch["answers"].tolist() == [[yes], [no]]


def test_what_is_trained_comes_back_and_nothing_else_changes(parts, tmp_path):
    torch.manual_seed(0)
    vlm = joined_vlm.join(*parts, attention=True)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    batch = vlm.batch(asked(vlm))
    with manyheads.use(vlm.model, "concentric_attention"):
        state = train_answers(vlm.model, lambda _: batch, 8, lr=2e-2, slower=0.5)
    assert state.losses[-1] < state.losses[0] - 0.1
    for name, p in vlm.model.named_parameters():
        own = "multi_modal_projector" in name or ("language_model" in name and "_proj" in name and "mlp" not in name)
        assert p.requires_grad == own and torch.equal(p, before[name]) != own, name
    joined_vlm.save(vlm, tmp_path / "made", {"note": 1})
    assert json.loads((tmp_path / "made" / "joined.json").read_text())["note"] == 1
    read = joined_vlm.load(tmp_path / "made")
    with torch.no_grad():
        assert torch.equal(answer_logits(read.model, batch), answer_logits(vlm.model, batch))
    joined_vlm.new_projector(read)
    with torch.no_grad():
        assert is_far(answer_logits(read.model, batch), answer_logits(vlm.model, batch), SAME)


def test_answers_are_predicted_where_they_are_asked_for():
    vlm = joined_vlm.small(patches=2, size=2, dim=16, layers=1)
    batch = vlm.batch(asked(vlm))
    inputs = {name: x for name, x in batch.items() if name not in ("at", "answers")}
    with torch.no_grad():
        whole = vlm.model(**inputs).logits
        found = answer_logits(vlm.model, batch)
    at = int(batch["at"][0, 0])
    assert_close(found[:, 0], whole[:, at], SAME)
    assert is_far(found[:, 0], whole[:, at - 1], SAME) and whole.shape[-1] == len(WORDS) + 3


def test_folders_without_a_joined_model_are_refused(parts, tmp_path):
    with pytest.raises(manyheads.UserError, match=r"recipes\.joined_vlm"):
        joined_vlm.load(tmp_path)
    plain = transformers.PreTrainedTokenizerFast.from_pretrained(parts[1])
    other = tmp_path / "text"
    transformers.LlamaForCausalLM.from_pretrained(parts[1]).save_pretrained(other)
    make_words().save_pretrained(other)
    assert plain.convert_tokens_to_ids("<empty_output>") is not None
    with pytest.raises(manyheads.UserError, match="can stand for a patch"):
        joined_vlm.join(parts[0], str(other))


@needs_data
def test_the_recipe_writes_a_model(parts, tmp_path, capsys):
    out = tmp_path / "made"
    given = ["--out", str(out), "--tower", parts[0], "--text", parts[1], "--budget", "2 steps", "--batch", "2"]
    assert recipe.main([*given, "--device", "cpu", "--strategy", "concentric_attention"]) == 0
    assert "answered rightly" in capsys.readouterr().out
    about = json.loads((out / "joined.json").read_text())
    assert about["strategy"] == "concentric_attention" and 0 <= about["right"] <= 1
    assert joined_vlm.load(out).parts == parts
