# SPDX-License-Identifier: Apache-2.0
"""The lenses' kernels on a GPU: bfloat16 too, and the shapes of real models."""

import dataclasses

import pytest
import torch
from transformers import StaticCache

import manyheads
from kernels.probe_cases import KINDS, build, errors, flat
from manyheads import kernels
from manyheads.calls.weights import measure
from manyheads.lenses.head_statistics import MEASURES
from oracles import models
from tolerance import DEVICE, is_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton"),
]

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def agrees(case):
    got = case.kernels("cuda")
    wrong = errors(got, case.truth())
    return max(wrong.values()) <= DEVICE and max(errors(got, case.truth(shift=1)).values()) > 10 * DEVICE, wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "size", "group", "dim"),
    [(1, 700, 4, 128), (300, 300, 1, 64), (700, 1500, 4, 128), (33, 1000, 3, 80), (200, 513, 2, 256)],
)
def test_formula(length, size, group, dim, dtype):
    right, wrong = agrees(build(dtype, length, size, group, dim, features=5, rows=2, width=50))
    assert right, wrong


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_seen(kind):
    right, wrong = agrees(build(torch.bfloat16, 300, 700, 4, 128, kind, features=5, rows=2, width=50))
    assert right, wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_features_and_sharp_rows(dtype):
    case = build(dtype, 500, 900, 4, 128, features=40, rows=33, width=1000, spread=30.0)
    assert max(errors(case.kernels("cuda"), case.truth()).values()) <= DEVICE
    wrong = dataclasses.replace(case, features=case.features.flip(2), weight=case.weight.flip(1))
    assert max(errors(case.kernels("cuda"), wrong.truth()).values()) > 10 * DEVICE


@pytest.mark.parametrize("kind", KINDS)
def test_measure_by_kernels_is_measure_by_blocks(kind):
    case = build(torch.bfloat16, 600, 1000, 4, 64, kind, features=5)
    case = dataclasses.replace(
        case, features=case.features.cuda(), weight=case.weight.cuda(), counted=case.counted.cuda(),
        profile=case.profile.cuda(),
    )  # fmt: skip
    call = case.call("cuda")
    index = case.index()
    made = []
    for block in (None, 128):
        asked = case.statistics()
        asked["columns"].index, asked["log"].keys = index.cuda(), case.sets().cuda()  # type: ignore[attr-defined]
        made.append(flat(case, measure(call, list(asked.values()), block)))
    wrong = errors(*made)
    assert max(wrong.values()) <= DEVICE, wrong


def test_two_runs_give_the_same_bits():
    case = build(torch.bfloat16, 2000, 3000, 4, 128)
    first = case.kernels("cuda")
    for _ in range(5):
        for name, x in case.kernels("cuda").items():
            assert torch.equal(x, first[name]), name


def test_steps_of_a_generation():
    """What waits is looked at by kernels, what does not by blocks; both are what the CPU says of the same text."""
    ids, found = models.tokens(2, 20), []
    cpu = models.tiny("llama")
    text = cpu.generate(ids, max_new_tokens=40, do_sample=False)
    for device, how in (("cpu", {}), ("cuda", {}), ("cuda", {"cache_implementation": "static"})):
        model, cache = models.build("llama").to(device), None
        with manyheads.watch(model, "head_statistics", "active_dormant") as seen, torch.no_grad():
            if how:
                cache = StaticCache(config=model.config, max_cache_len=70)
            out = model(text[:, :20].to(device), past_key_values=cache, use_cache=True)
            for i in range(20, 59):
                out = model(text[:, i : i + 1].to(device), past_key_values=out.past_key_values)
        found.append((seen.compute(0).steps, seen.compute(1).tables["sink"].values))
    for steps, sink in found[1:]:
        assert is_close(sink, found[0][1], DEVICE)
        assert all(is_close(steps[name], found[0][0][name], DEVICE) for name in MEASURES if name != "top")
        assert (steps["top"] == found[0][0]["top"]).mean() > 0.99
