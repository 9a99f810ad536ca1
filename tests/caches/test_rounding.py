# SPDX-License-Identifier: Apache-2.0
"""KIVI and QuaRot: what is rounded and what is not, and which outliers each survives."""

import pytest
import torch

from manyheads.caches._rounding import rounded
from manyheads.caches.quarot import hadamard
from manyheads.call import AttentionCall, Site
from manyheads.errors import UserError
from manyheads.spec import parse
from tolerance import CLOSE, is_close

OLD, WINDOW, NEW, DIM = 96, 8, 2, 32


def edited(spec, k, v):
    q = torch.randn(1, 4, NEW, DIM)
    call = AttentionCall(Site("attn", 0, 0, "self", True), q, k, v, DIM**-0.5)
    return parse(f"{spec},window_tokens={WINDOW}").edit(call)


def keys(outlier=1.0):
    k = torch.randn(1, 2, OLD + WINDOW + NEW, DIM)
    k[..., 5] *= outlier
    return k, torch.randn_like(k)


@pytest.mark.parametrize("spec", ["kivi:group=32", "quarot:layers=0"])
def test_window_and_new_tokens_stay_and_older_ones_are_rounded(spec):
    k, v = keys()
    found = edited(spec, k, v)
    assert torch.equal(found.k[:, :, OLD:], k[:, :, OLD:]) and torch.equal(found.v[:, :, OLD:], v[:, :, OLD:])
    assert not torch.isclose(found.k[:, :, :OLD], k[:, :, :OLD]).all(2).any()
    assert torch.equal(found.v[:, :, :OLD], rounded(v[:, :, :OLD], -1))
    short = edited(spec, k[:, :, : WINDOW + NEW], v[:, :, : WINDOW + NEW])
    assert torch.equal(short.k, k[:, :, : WINDOW + NEW])


def test_what_fills_no_group_stays():
    k, v = keys()
    found = edited("kivi:group=64", k, v).k
    assert torch.equal(found[:, :, 64:OLD], k[:, :, 64:OLD]) and not torch.equal(found[:, :, :64], k[:, :, :64])


@pytest.mark.parametrize("spec", ["kivi:group=32", "quarot:layers=0"])
def test_an_outlying_channel_does_not_drown_the_others(spec):
    k, v = keys(outlier=30.0)
    others = [channel for channel in range(DIM) if channel != 5]

    def error(x):
        return float((x[:, :, :OLD] - k[:, :, :OLD])[..., others].norm() / k[:, :, :OLD][..., others].norm())

    by_token = k.clone()
    by_token[:, :, :OLD] = rounded(k[:, :, :OLD], -1)
    assert error(by_token) > 0.6  # the control: the scale of the outlier takes most of the others
    assert error(edited(spec, k, v).k) < 0.5 * error(by_token)


def test_hadamard_is_orthogonal_and_needs_a_power_of_two():
    h = hadamard(32, torch.device("cpu"))
    assert is_close(h @ h.T, torch.eye(32), CLOSE)
    with pytest.raises(UserError, match="power of two"):
        hadamard(48, torch.device("cpu"))


@pytest.mark.parametrize("spec", ["kivi:group=0", "kivi:window_tokens=-1", "quarot:window_tokens=-1"])
def test_senseless_fields_are_refused(spec):
    with pytest.raises(UserError):
        parse(spec)


def test_the_rotation_is_sylvesters():
    """Entry (i, j) has the sign of the parity of i and j's common bits; other sizes have none."""
    cpu = torch.device("cpu")
    for size in (1, 2, 4, 16):
        signs = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
        assert is_close(hadamard(size, cpu), torch.tensor(signs) / size**0.5, CLOSE)
    for size in (0, 3, 12, -4):
        with pytest.raises(UserError, match=f"a head of {size} channels has no Sylvester rotation"):
            hadamard(size, cpu)


def test_quarot_rounds_each_key_over_its_turned_channels():
    """By hand: turned, one scale a token, rounded to sixteen levels, turned back; tokens do not share a scale."""
    k = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9, 1, 30, 1])[:, None]
    made = parse("quarot").keys(k)
    turn = hadamard(8, torch.device("cpu"))
    for h in range(2):
        for t in range(5):
            row = k[0, h, t] @ turn
            assert is_close(made[0, h, t], rounded(row[None], -1)[0] @ turn.T, CLOSE)
            assert float((made[0, h, t] - k[0, h, t]).norm() / k[0, h, t].norm()) < 0.2
