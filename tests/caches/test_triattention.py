# SPDX-License-Identifier: Apache-2.0
"""TriAttention: the trigonometric series of the mean query over distances, and the spread of the queries, in loops."""

import cmath
import math

import pytest

from caches.formula import DIM
from caches.rows import agrees
from caches.test_expected_attention import angles, matrix, turned
from manyheads import UserError, parse
from oracles import caches, models


def formula(offset_max=65536, *, rotary_dim=DIM, factor=1.0, trig=True, norm=True, group="max", z=True, sinks=0):
    """Scores of the tokens of a key/value head, as the paper writes them, over complex pairs."""
    half, omegas = rotary_dim // 2, [*angles(rotary_dim), *[0.0] * (DIM - rotary_dim)]

    def pairs(x):
        turning = [complex(float(x[i]), float(x[i + half])) for i in range(half)]
        return [*turning, *(complex(float(a)) for a in x[rotary_dim:])]

    def score(row, h):
        deltas = [2**i for i in range(offset_max.bit_length())]
        by_head = []
        for g in range(h * row.groups, (h + 1) * row.groups):
            asked = [pairs(matrix(t, rotary_dim, factor).inverse() @ row.q[g, t]) for t in range(sinks, row.seen)]
            mean = [sum(q[f] for q in asked) / max(1, len(asked)) for f in range(len(omegas))]
            size = [sum(abs(q[f]) for q in asked) / max(1, len(asked)) for f in range(len(omegas))]
            found = []
            for s in row.held[h]:
                key = pairs(matrix(s, rotary_dim, factor).inverse() @ row.k[h, s])
                total = 0.0
                for f, omega in enumerate(omegas):
                    a = factor**2 if f < half else 1.0
                    phase = cmath.phase(mean[f] * key[f].conjugate())
                    far = row.seen - 1 - s
                    series = sum(math.cos(omega * (far + d) + phase) for d in deltas) / len(deltas)
                    total += a * abs(mean[f]) * abs(key[f]) * series if trig else 0.0
                    total += a * (size[f] - abs(mean[f])) * abs(key[f]) if norm else 0.0
                found.append(total)
            middle = sum(found) / len(found)
            spread = math.sqrt(sum((x - middle) ** 2 for x in found) / len(found))
            by_head.append([(x - middle) / (spread if z else 1.0) for x in found])
        best = max if group == "max" else sum
        return [best(x) for x in zip(*by_head, strict=True)]

    return score


@pytest.mark.parametrize(
    ("budget", "offset", "schedule", "heads", "padding"),
    [
        (7, 65536, "prefill", 4, (0, 0)),
        (0.6, 16, "step", 8, (0, 5)),
        (6, 1, 3, 2, (2, 0)),
        (5, 100, "chunk", 8, (2, 5)),
    ],
)
def test_against_loops(budget, offset, schedule, heads, padding):
    policy = parse(f"triattention:budget={budget},offset_max={offset},schedule={schedule}")
    agrees(policy, formula(offset), heads, padding, turned=turned())


@pytest.mark.parametrize(("rotary_dim", "factor", "shift"), [(4, 1.0, 0), (6, 1.3, 0), (4, 1.2, 0), (6, 1.0, 90)])
def test_partial_and_scaled_rotations_and_later_beginnings(rotary_dim, factor, shift):
    """The series goes by distances, so where positions begin does not matter."""
    policy = parse("triattention:budget=6,offset_max=16,schedule=step")
    agrees(policy, formula(16, rotary_dim=rotary_dim, factor=factor), turned=turned(rotary_dim, factor, shift=shift))


@pytest.mark.parametrize("part", ["trig", "norm"])
def test_parts(part):
    policy = parse(f"triattention:budget=6,offset_max=16,schedule=step,use_{part}=false")
    agrees(policy, formula(16, **{part: False}), turned=turned())


def test_control_of_the_loops():
    policy = parse("triattention:budget=6,offset_max=16,schedule=step")
    agrees(policy, formula(16), heads=8, turned=turned())
    wrong = (
        formula(1), formula(16, trig=False), formula(16, norm=False), formula(16, group="sum"), formula(16, z=False),
        formula(16, rotary_dim=4), formula(16, sinks=2),
    )  # fmt: skip
    for score in wrong:
        with pytest.raises(AssertionError):
            agrees(policy, score, heads=8, turned=turned())


@pytest.mark.parametrize("oracle", [caches.batch_equals_singles_padded_left, caches.rows_can_be_rearranged,
                                    caches.protected_stay, caches.bytes_are_real])  # fmt: skip
def test_oracles(oracle):
    oracle(models.tiny("llama"), "triattention:budget=6,schedule=step")


@pytest.mark.parametrize("fields", ["offset_max=0", "use_trig=false,use_norm=false"])
def test_refuses(fields):
    with pytest.raises(UserError, match="triattention"):
        parse(f"triattention:{fields}")


def test_refuses_models_whose_rotation_is_unknown():
    model = models.tiny("gpt2")
    with pytest.raises(UserError, match="triattention needs the rotary positions"):
        caches.on_means_on(model, "triattention:budget=6")
