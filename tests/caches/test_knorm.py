# SPDX-License-Identifier: Apache-2.0
"""Knorm: minus the L2 norm of the key."""

import warnings

import pytest
import torch

import manyheads
from caches.formula import agrees, drive, sequences
from manyheads import UserError, parse
from oracles import models
from oracles.caches import greedy


def formula(held, k, q, seen):
    return [-(sum(float(x) ** 2 for x in k[s]) ** 0.5) for s in held]


@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "schedule"), [(6, "prefill"), (0.5, "prefill"), (5, "step"), (0.6, 3), (4, "chunk")]
)
def test_against_loops(budget, schedule, heads, padding):
    agrees(parse(f"knorm:budget={budget},schedule={schedule}"), formula, heads, padding)


def test_control_of_the_loops():
    with pytest.raises(AssertionError):
        agrees(parse("knorm:budget=6"), lambda *a: [-x for x in formula(*a)])


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
@pytest.mark.parametrize("spec", ["knorm:budget=0.5", "adakv:base=knorm,budget=0.5"])
def test_normalised_keys_are_warned_of(name, spec):
    said = "knorm: this model normalises its keys.*choose keydiff or snapkv"
    with pytest.warns(UserWarning, match=said), manyheads.use(models.tiny(name), spec):
        greedy(models.tiny(name), models.tokens(1, 20), count=2)


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama", "knorm:budget=0.5"),
        ("olmo2", "knorm:budget=0.5"),  # one norm over all heads: those of single heads differ
        ("qwen3", "keydiff:budget=0.5"),
        ("qwen3", "knorm:budget=1.0"),
    ],
)
def test_other_keys_are_not(name, spec):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with manyheads.use(models.tiny(name), spec):
            greedy(models.tiny(name), models.tokens(1, 40), count=2)


def test_protected_tokens_stay():
    agrees(parse("knorm:budget=6,schedule=step,sinks=2,recent=2"), formula)


def test_the_shortest_stay():
    q, k, v = sequences(1, 4, 40)
    k = k / k.norm(dim=-1, keepdim=True) * torch.linspace(2, 1, 40)[:, None]
    k[0, 0, 3], k[0, 1, 8] = 0.0, 0.01
    _, kept, _ = drive(parse("knorm:budget=3"), q, k, v, [40])
    assert kept[0].tolist() == [[[3, 38, 39], [8, 38, 39]]]


def test_norms_are_not_rounded_to_the_dtype_of_the_keys():
    """Keys in bfloat16 whose norms differ by less than bfloat16 can tell; the newest have the longest."""
    q, k, v = sequences(1, 4, 64, dtype=torch.bfloat16)
    k[:] = 1.0
    k[..., 0] += torch.arange(64) * 2**-7
    norms = k[0, 0].float().norm(dim=-1)
    assert norms.bfloat16().unique().numel() < 40 and norms.unique().numel() == 64
    _, kept, _ = drive(parse("knorm:budget=9"), q, k, v, [64])
    assert kept[0].tolist() == [[list(range(9))] * 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_equals_the_newer_stays(dtype):
    q, k, v = sequences(2, 4, 300, dtype=dtype)
    k[:] = k[:, :, :1]
    _, kept, _ = drive(parse("knorm:budget=7"), q, k, v, [300])
    assert kept[0].tolist() == [[list(range(293, 300))] * 2] * 2


@pytest.mark.parametrize("fields", ["budget=0", "schedule=never", "sinks=-1", "budget=3,recent=4"])
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"knorm:{fields}")
