# SPDX-License-Identifier: Apache-2.0
"""The decoder around any mixer: saved and loaded, matched in size, started as it says, generating what it computes."""

import json

import pytest
import torch

from manyheads.errors import UserError
from manyheads.models.decoder import Decoder, DecoderConfig
from oracles import mixers
from oracles.mixers import SPECS
from tolerance import DRAWN, WRONG, error, spread_error

CONFIG = DecoderConfig(29, dim=32, layers=2, heads=4, length=64)
IDS = torch.randint(29, (2, 11), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("spec", SPECS)
def test_saved_and_loaded(spec, tmp_path):
    model = Decoder(spec, CONFIG).eval()
    model.save(tmp_path / "one")
    other = Decoder.load(tmp_path / "one")
    assert other.strategy == model.strategy and other.config == CONFIG and not other.training
    assert torch.equal(other(IDS)[0], model(IDS)[0])
    fresh = Decoder(spec, CONFIG).eval()  # control: other weights
    assert error(fresh(IDS)[0], model(IDS)[0]) > 1e-2


def test_loading_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        Decoder.load(tmp_path)
    Decoder("softmax", CONFIG).save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no decoder"):
        Decoder.load(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["strategy"] == "softmax"


@pytest.mark.parametrize("spec", SPECS)
def test_matched_within_two_percent(spec):
    for wanted in (60_000, 101_234):
        model = Decoder.matched(spec, CONFIG, wanted)
        assert abs(model.parameters_held - wanted) <= 0.02 * wanted
        parts = [part for part in model.modules() if hasattr(part, "active_share")]  # a token meets that share of them
        idle = sum((1 - part.active_share) * sum(p.numel() for p in part.parameters()) for part in parts)
        assert model.parameters_held == sum(x.numel() for x in model.state_dict().values()) - round(idle)
    with pytest.raises(UserError, match="cannot be brought to 3,000"):
        Decoder.matched(spec, CONFIG, 3_000)


@pytest.mark.parametrize("spec", SPECS)
def test_generates_what_it_computes(spec):
    model = mixers.decoder(spec).double()  # the logits of a random model nearly tie in float32
    ids = IDS
    for _ in range(9):
        ids = torch.cat([ids, model(ids)[0][:, -1].argmax(-1, keepdim=True)], 1)
    made = model.generate(IDS, 9)
    assert torch.equal(made, ids[:, 11:])
    assert torch.equal(model.generate(IDS, 1), ids[:, 11:12]) and model.generate(IDS, 0).shape == (2, 0)
    assert torch.equal(model.generate(IDS[:1, :1], 3), model.generate(IDS[:1, :1], 5)[:, :3])


@pytest.mark.parametrize("spec", SPECS)
def test_every_parameter_learns(spec):
    model = mixers.decoder(spec, layers=8 if spec == "minimax_hybrid" else 2).requires_grad_(True).train()
    model(IDS)[0].square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_starts_as_gpt2():
    model = Decoder("softmax", DecoderConfig(500, dim=128, layers=8, heads=4))
    attention, ffn = model.blocks[0].mixer, model.blocks[0].ffn
    for weight, std in (
        (model.embed.weight, 0.02), (attention.q_proj.weight, 0.02), (ffn.up.weight, 0.02),
        (attention.out_proj.weight, 0.02 / 4), (ffn.down.weight, 0.02 / 4),
    ):  # fmt: skip
        found, draws = weight.std().item(), weight.numel()
        assert spread_error(found, std, draws) < DRAWN and spread_error(found, 0.9 * std, draws) > WRONG


def test_refusals():
    with pytest.raises(UserError, match="no token mixer"):
        Decoder("snapkv", CONFIG)
    with pytest.raises(UserError, match="do not part into"):
        Decoder("softmax", DecoderConfig(29, dim=30, heads=4))
