# SPDX-License-Identifier: Apache-2.0
"""Shared projections: weights are sums, matrices one parameter for all layers, and the model an ordinary one after."""

import pytest
import torch

from manyheads import UserError, parse
from manyheads.mixers.weight_sharing import SharedProjection
from manyheads.models.decoder import Decoder, DecoderConfig
from tolerance import assert_close, is_far

LAYERS, NAMES = 6, ("q_proj", "k_proj", "v_proj", "out_proj")
CONFIG = DecoderConfig(29, 32, LAYERS, 4, kv_heads=2, hidden=24, length=16)
IDS = torch.arange(22).view(2, 11) % 29


def model(spec):
    torch.manual_seed(0)
    return Decoder(spec, CONFIG).double().eval()


def projections(decoder, name):
    return [getattr(block.mixer, name) for block in decoder.blocks]


def ordinary(ours):
    """The model with softmax attention that has the same weights."""
    plain = model("softmax")
    state = {name: x for name, x in ours.state_dict().items() if ".own." not in name}
    for name in NAMES:
        numbers, atoms = (projections(ours, name)[0].own.coefficients(), projections(ours, name)[0].own.atoms)
        for i in range(LAYERS):
            state[f"blocks.{i}.mixer.{name}.weight"] = numbers[i, 0] * atoms[0] + numbers[i, 1] * atoms[1]
    plain.load_state_dict(state)
    return plain


def test_the_model_is_an_ordinary_one_and_layers_differ():
    ours = model("weight_sharing")
    plain = ordinary(ours)
    assert_close(ours(IDS)[0].detach(), plain(IDS)[0].detach(), 1e-12)
    for name in NAMES:
        first, second, *_ = projections(ours, name)
        assert first.own.atoms.shape[0] == 2
        assert_close(first.own.coefficients().norm(dim=1).detach(), torch.ones(LAYERS), 0.1)  # where training begins
        assert is_far(second.weight.detach(), first.weight.detach(), 0.01)


@pytest.mark.parametrize(
    ("share", "places"), [("sequential", [0, 0, 0, 1, 1, 1]), ("repeat", [0, 1, 0, 1, 0, 1])]
)  # fmt: skip
def test_layers_share_in_a_row_or_in_turn(share, places):
    parts = projections(model(f"weight_sharing:share={share}"), "v_proj")
    atoms = parts[0].own.atoms
    assert all(torch.equal(part.weight, atoms[place]) for part, place in zip(parts, places, strict=True))


def test_the_gradient_of_a_shared_matrix_is_the_sum_over_layers():
    ours = model("weight_sharing")
    plain = ordinary(ours)
    for made in (ours, plain):
        made(IDS)[0].square().sum().backward()
    for name in NAMES:
        first = projections(ours, name)[0].own
        grads = torch.stack([part.weight.grad for part in projections(plain, name)])
        assert_close(first.atoms.grad, torch.einsum("ls,loi->soi", first.coefficients().detach(), grads), 1e-12)
        assert is_far(first.atoms.grad[0], grads[0], 0.01)


def test_parameters_are_those_of_the_formula():
    whole = model("softmax").parameters_held
    attention = LAYERS * (2 * 32 * 32 + 2 * 16 * 32)
    for share in ("sequential", "repeat"):
        assert model(f"weight_sharing:share={share}").parameters_held == whole - attention * 2 // 3
    numbers = 4 * LAYERS * 2  # learned, and where they begin
    assert model("weight_sharing").parameters_held == whole - attention * 2 // 3 + 2 * numbers
    kept = LAYERS * (2 * int(32 / 6) * 64 + 2 * int(16 * 32 / 3 / 48) * 48)
    assert model("weight_sharing:share=low_rank").parameters_held == whole - attention + kept
    assert model("weight_sharing:share=none").parameters_held == whole
    qkv = model("weight_sharing:parts=qkv")
    assert isinstance(qkv.blocks[0].mixer.out_proj, torch.nn.Linear)
    grouped = model("weight_sharing:share=none,kv_heads=1")
    assert grouped.blocks[0].mixer.k_proj.weight.shape == (8, 32)


def test_a_model_is_saved_once_and_comes_back(tmp_path):
    ours = model("weight_sharing")
    assert sum("atoms" in name for name in ours.state_dict()) == len(NAMES)
    ours.save(tmp_path)
    assert_close(Decoder.load(tmp_path)(IDS)[0].detach(), ours.float()(IDS)[0].detach(), 1e-5)
    assert isinstance(ours.blocks[3].mixer.q_proj, SharedProjection)


def test_what_cannot_be_is_refused():
    for spec, said in (("keep=0", "a share"), ("parts=qq", "parts are"), ("share=x", "share")):
        with pytest.raises(UserError, match=said):
            parse(f"weight_sharing:{spec}")
    with pytest.raises(UserError, match="do not divide"):
        model("weight_sharing:kv_heads=3")
