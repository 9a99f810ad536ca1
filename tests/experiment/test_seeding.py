# SPDX-License-Identifier: Apache-2.0
"""A draw is named by its axes: the same in every process, and no other."""

import subprocess
import sys

import numpy as np
import torch

from manyheads.experiment import seeding


def test_a_draw_is_the_same_however_its_axes_are_named():
    assert seeding.number(3, task="a", length=8) == seeding.number(3, length=8, task="a")
    one, other = (seeding.generator(3, task="a").random(5) for _ in range(2))
    assert (one == other).all()
    one, other = (torch.rand(5, generator=seeding.torch_generator(3, task="a")) for _ in range(2))
    assert torch.equal(one, other)


def test_draws_differ_by_seed_axis_and_value():
    draws = [
        seeding.number(seed, **axes)
        for seed in range(20)
        for axes in ({}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": "1 "}, {"a": 1.0})
    ]
    assert len(set(draws)) == len(draws) and all(0 <= number < 2**63 for number in draws)


def test_neighbouring_seeds_are_unrelated():
    draws = np.stack([seeding.generator(seed, a=1).normal(size=400) for seed in range(30)])
    off = np.corrcoef(draws)[np.triu_indices(30, 1)]
    assert abs(off).max() < 0.25  # of 435 pairs; one equal pair would give 1


def test_another_process_draws_the_same():
    code = "from manyheads.experiment.seeding import number; print(number(7, task='x', length=1024))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) == seeding.number(7, task="x", length=1024)
