# SPDX-License-Identifier: Apache-2.0
"""A prompt that hosts share: an arm has the same figures in whichever unit it is measured; the baseline stays one."""

import dataclasses

import torch

from manyheads.experiment import Arm, CausalLM, RunContext
from manyheads.tasks.text.passing import Passing

ARMS = (Arm("full"), Arm("star", "apb:hosts=4,anchor=1.0,passed=0"), Arm("apb", "apb:hosts=4"))


def measured(arms: list[int]) -> dict[tuple[str, str], float]:
    subject = CausalLM()
    subject.load(torch.device("cpu"))
    run = RunContext(subject, ARMS)
    task = Passing(lengths=(96,), samples=1, target=16, text="prose")
    (unit,) = task.units(run)
    unit = dataclasses.replace(unit, params={**unit.params, "arms": arms})
    return {(row.arm, row.metric): row.value for row in task.measure(run, unit)}


def test_units_of_some_arms_say_what_one_of_all_says():
    whole, last, first = measured([0, 3]), measured([1, 3]), measured([0, 1])
    assert first | last == whole
    assert last["star", "kl"] > 0 and last["apb", "kl"] > 0 == whole["full", "kl"]


def test_a_part_of_a_run_keeps_its_baseline_and_what_is_kept():
    run = RunContext(CausalLM(), ARMS)
    part = run.among(ARMS[1:], advance=lambda done: None).among(ARMS[2:], advance=lambda done: None)
    assert part.baseline == ARMS[0] != part.arms[0]
    assert part.kept("drawn", lambda: 1) == run.kept("drawn", lambda: 2) == 1
