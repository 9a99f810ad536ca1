# SPDX-License-Identifier: Apache-2.0
"""Decay attention's kernels under Triton's interpreter, on the CPU. Collected in a process of its own by
test_interpreter.py. Float32 and float16 only: the interpreter computes bfloat16 wrongly.
"""

import pytest
import torch

from kernels import decay_cases
from kernels.decay_cases import build, errors, kernel, worst, wrong_variants
from kernels.interpreted import _mended  # noqa: F401 - a fixture that mends the interpreter
from manyheads import UserError
from manyheads.attention.recurrence import DecayState, decay_attention
from manyheads.kernels import _passes, recurrence
from tiers import spread
from tolerance import SAME, assert_close, is_close, is_far

CASES = [
    {"length": 1, "norm": "mlstm"},
    {"length": 2, "gate": "none", "norm": "sum"},
    {"length": 63, "gate": "head", "width": 48, "columns": 16, "dtype": torch.float16},
    {"length": 64, "gate": "none", "heads": 1, "columns": 48, "final": False},
    {"length": 65, "norm": "mlstm", "batch": 2, "dtype": torch.float16},
    {"length": 35, "norm": "sum", "gate": "head", "batch": 2, "heads": 4, "kv_heads": 2},
    {"length": 70, "norm": "mlstm", "width": 24, "columns": 40, "start": False},
    {"length": 40, "width": 64, "columns": 128, "norm": "mlstm", "dtype": torch.float16},
    {"length": 30, "width": 128, "columns": 64, "heads": 1},
    {"length": 20, "width": 200, "columns": 16, "heads": 1, "norm": "sum", "dtype": torch.float16},
    {"packed": [0, 5, 6, 75, 75, 110], "norm": "mlstm"},
    {"packed": [0, 64, 129, 130], "norm": "sum", "gate": "head", "heads": 3, "dtype": torch.float16},
]


@spread("given", CASES, 7, ids=str)
def test_four_ways(given):
    """The definition in float64, torch in chunks and the kernels; both within the limits of the definition."""
    case = build(**given)
    got = kernel(case)
    assert worst(case, got) <= 1, errors(case, got)
    assert got["out"].dtype == got["dq"].dtype == case.dtype and got["state"].dtype == torch.float32
    if case.dtype == torch.float32:
        assert worst(case, case.run("torch")) <= 1


@pytest.mark.parametrize(("processors", "segments"), [(4, 2), (8, 4)])
def test_segments(processors, segments, monkeypatch):
    """One, two and more segments of several chunks, the last of them short."""
    monkeypatch.setattr(_passes, "_processors", lambda x: processors)
    monkeypatch.setattr(_passes, "_PROGRAMS", 1)
    case = build(length=200, heads=2, norm="mlstm")
    plan = _passes.Plan.of(*(case.given[name] for name in "qkv"), None, "mlstm")
    assert plan.segments == segments and plan.length % 32 == 0
    got = kernel(case)
    assert worst(case, got) <= 1, errors(case, got)


@spread(
    "given",
    [
        {"norm": "mlstm", "heads": 4, "kv_heads": 2, "columns": 48},
        {"norm": "sum", "gate": "head", "width": 40, "columns": 72, "dtype": torch.float16},
        {"gate": "none", "heads": 3, "kv_heads": 3, "start": False},
    ],
    2,
    ids=str,
)
def test_whole_sequences(given, monkeypatch):
    """One segment of several chunks each: the state at the end comes out of the pass for the output."""
    monkeypatch.setattr(_passes, "_processors", lambda x: 1)
    case = build(length=150, batch=2, **given)
    assert _passes.Plan.of(*(case.given[name] for name in "qkv"), None, "").whole
    got = kernel(case)
    assert worst(case, got) <= 1, errors(case, got)
    for name, wrong in wrong_variants(case).items():
        assert worst(wrong, got) > 5, name


@pytest.mark.parametrize(
    "given",
    [
        {"length": 40, "batch": 2, "norm": "mlstm", "columns": 32},
        {"packed": [0, 7, 40], "norm": "sum", "heads": 1, "dtype": torch.float16},
    ],
    ids=["mlstm", "packed"],
)
def test_wrong_variants_fail(given):
    case = build(**given)
    got = kernel(case)
    assert worst(case, got) <= 1
    for name, wrong in wrong_variants(case).items():
        assert worst(wrong, got) > 5, name


@pytest.mark.parametrize("norm", [None, "sum", "mlstm"])
def test_step(norm):
    """One token goes through its own kernel where no gradient is wanted."""
    case = build(length=1, batch=2, heads=4, kv_heads=2, norm=norm, width=24, columns=40)
    q, k, v, g, floor, kv, n = case.given.values()
    given = {"scale": case.scale, "norm": norm, "floor": floor}
    out, after = decay_attention(q, k, v, g, state=DecayState(kv, n), impl="triton", **given)
    want = case.run("quadratic", torch.float64)
    assert_close(out.double(), want["out"], SAME)
    assert_close(after.kv.double(), want["state"], SAME)
    assert norm is None or is_close(after.k.double(), want["vector"], SAME)
    other, _ = decay_attention(q, k, v, g, state=DecayState(kv.flip(0), n), impl="triton", **given)
    assert is_far(other.double(), want["out"], SAME)


def test_strong_decay_forgets_exactly():
    """Gates of -inf, and others so low that a total of them would overflow if it were ever divided by."""
    case = build(length=70, heads=1, start=False)
    q, k, v, *_ = case.given.values()
    for g in (torch.full((1, 1, 70), -torch.inf), torch.full((1,), -1e4)):
        out, _ = decay_attention(q, k, v, g, impl="triton")
        assert_close(out, (q * k).sum(-1, keepdim=True) * v)


def test_large_states_in_half_precision():
    """Sums above 65504, the largest float16, in the state."""
    q, k = torch.full((1, 1, 130, 16), 2.0**-10), torch.full((1, 1, 130, 16), 60.0)
    v = torch.full((1, 1, 130, 16), 60.0)
    out, after = decay_attention(*(x.half() for x in (q, k, v)), impl="triton")
    want, _ = decay_attention(q.double(), k.double(), v.double(), impl="quadratic")
    assert after.kv.max() > 4e5
    assert_close(out.double(), want, 2e-3)


def test_the_operator_is_well_formed():
    """Schema, shapes and strides of the fake, autograd; sizes may be symbolic."""
    case = build(norm="mlstm", batch=2, length=9)
    q, k, v, g, floor, kv, n = (x.requires_grad_() for x in case.given.values())
    q = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(recurrence._forward, (q, k, v, g, floor, kv, n, None, 0.5, "mlstm"))


def test_strangers_are_refused():
    q = torch.randn(1, 1, 3, 16)
    for x in (q.double(), torch.randn(1, 1, 3, 300)):
        with pytest.raises(UserError, match="impl=torch"):
            decay_attention(x, x, x, impl="triton")


@spread(
    ("given", "overlap"),
    [
        ({"length": 70, "batch": 2, "gate": "token"}, True),
        ({"length": 70, "gate": "head", "heads": 4, "kv_heads": 2, "columns": 48, "dtype": torch.float16}, True),
        ({"length": 50, "gate": "none", "start": False}, True),
        ({"length": 70, "batch": 2, "gate": "token", "heads": 2, "kv_heads": 2}, False),
        ({"length": 60, "norm": "sum", "gate": "head"}, False),
        ({"length": 70, "norm": "mlstm"}, False),
    ],
    3,
    ids=str,
)
def test_shares_of_a_sequence(given, overlap, monkeypatch):
    """Three shares that pass on one state are the whole sequence; without what comes on the way back they are not."""
    monkeypatch.setattr(_passes, "_processors", lambda x: 4)
    monkeypatch.setattr(_passes, "_PROGRAMS", 1)
    case = build(**given)
    for lost in (False, True):
        monkeypatch.setattr(
            decay_cases, "decay_attention", decay_cases.in_shares([33, 40], overlap, decay_cases.Line(lost))
        )
        got = kernel(case)
        assert (worst(case, got) > 5) if lost else (worst(case, got) <= 1), errors(case, got)
