# SPDX-License-Identifier: Apache-2.0
"""Time by length, and the state: the ones that grow and the ones that do not."""

import pytest

from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.tasks.training.mixer_cost import MixerCost
from manyheads.tasks.training.mixer_speed import MixerSpeed

from .conftest import MODEL, SOFTMAX, values

WINDOW = Arm("window", "softmax:window=16")


def test_state_grows_with_what_is_kept(measured):
    results = measured(MixerCost(**MODEL, length=32, lengths=(32, 128)), arms=(SOFTMAX, WINDOW))
    state = {(arm, at["length"]): value for arm, _, _, at, value in values(results, "state")}
    # Of twelve tokens decoded at each length, those of the shorter are not read again: 128 + 12 over 32 + 12.
    assert state["softmax", 128] / state["softmax", 32] == pytest.approx(140 / 44, rel=0.01)
    assert state["window", 128] == state["window", 32] < state["softmax", 128]
    decode = values(results, "decode")
    assert len(decode) == 2 * 2 * 10 and all(value > 0 for *_, value in decode)


def test_training_is_timed_at_every_length(measured):
    task = MixerSpeed(**MODEL, length=32, times=(1, 16), tokens=512, rounds=3, only=("softmax",))
    results = measured(task, arms=(SOFTMAX, WINDOW))
    found = values(results, "token_time")
    assert {(arm, at["times"]) for arm, _, _, at, _ in found} == {("softmax", 1), ("softmax", 16)} and len(found) == 6
    with pytest.raises(UserError, match="do not part"):
        MixerSpeed(length=48, tokens=512)
