# SPDX-License-Identifier: Apache-2.0
"""A training that was killed goes on to the bit; a checkpoint is whole or absent; another training's is refused."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from manyheads.errors import UserError
from manyheads.training import Checkpoint, decay, fit
from manyheads.training.checkpoint import RandomState, newest, read, write


def train(folder, steps=9, kill_after=0, width=12):
    """A model with dropout, two optimisers, a scheduler and a generator of its own."""
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.3), nn.Linear(width, 2))
    optimizers = [
        torch.optim.AdamW(model[0].parameters(), lr=1e-2), torch.optim.SGD(model[2].parameters(), 1e-2, momentum=0.9),
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    averaged = torch.optim.swa_utils.AveragedModel(model)

    def get_batch(step):
        return torch.randn(6, 4, generator=generator) * (1 + random.random())

    def on_step(state):
        averaged.update_parameters(model)
        if state.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = folder and Checkpoint(Path(folder), every=3, keep={"draws": generator, "average": averaged})
    state = fit(
        model, get_batch, lambda net, x: (net(x) - x[:, :2]).square().mean(), budget=steps, optimizers=optimizers,
        schedule=decay("cosine", warmup=2), checkpoint=checkpoint or None, on_step=on_step,
    )  # fmt: skip
    return {**{f"average.{n}": x for n, x in averaged.state_dict().items()}, **model.state_dict()}, state


def killed(folder, after):
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_checkpoint as t; "
    code += f"t.train({str(folder)!r}, kill_after={after})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_killed_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    wanted, whole = train(None)
    killed(tmp_path / "right", after=7)
    assert [path.name for path in (tmp_path / "right").iterdir()] == ["step-00000006"]
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    found, state = train(tmp_path / "right")
    assert same(found, wanted) and state.losses == whole.losses and state.step == 9
    again, state = train(tmp_path / "right")  # finished: nothing is trained any more
    assert same(again, wanted) and state.losses == whole.losses
    monkeypatch.setattr(RandomState, "load_state_dict", lambda self, state: torch.manual_seed(5))
    assert not same(train(tmp_path / "wrong")[0], wanted)


def test_an_unfinished_checkpoint_is_not_read(tmp_path):
    wanted, _ = train(tmp_path)
    (tmp_path / "step-00000012.partial").mkdir()
    assert newest(tmp_path) == tmp_path / "step-00000009" and newest(tmp_path / "none") is None
    assert same(train(tmp_path)[0], wanted)


def test_what_is_written_while_it_fails_leaves_the_last(tmp_path):
    class Broken:
        def state_dict(self):
            return {"x": object()}

    class Number(Broken):
        def state_dict(self):
            return {"x": 1}

    shared = {"model": nn.Linear(2, 2), "state": Number()}
    write(tmp_path, 1, shared, {}, 0, lambda: None)
    with pytest.raises(TypeError, match="no object"):
        write(tmp_path, 2, shared, {"own": Broken()}, 0, lambda: None)
    assert newest(tmp_path) == tmp_path / "step-00000001"
    write(tmp_path, 2, shared, {}, 0, lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_checkpoints_of_other_trainings_are_refused(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(UserError, match=r"its budget is 4 steps.*another folder"):
        train(tmp_path, steps=5)
    with pytest.raises(UserError, match=r"no checkpoint of this training \(Error"):
        train(tmp_path, steps=4, width=13)
    (newest(tmp_path) / "process-0.json").unlink()
    with pytest.raises(UserError, match="no checkpoint of this training"):
        train(tmp_path, steps=4)


def test_kinds_of_values_come_back(tmp_path):
    value = {
        "list": [1, 2.5, None, True], "tuple": (0.9, 0.95), 3: {"deep": torch.arange(3, dtype=torch.bfloat16)},
        "text": "x", "nan": float("inf"), "scalar": torch.tensor(7),
    }  # fmt: skip

    class Kept:
        def state_dict(self):
            return value

        def load_state_dict(self, state):
            self.found = state

    model = nn.Embedding(4, 2)
    write(tmp_path, 1, {"model": model}, {"kept": Kept()}, 0, lambda: None)
    kept = Kept()
    read(tmp_path / "step-00000001", {"model": model}, {"kept": kept}, 0)
    deep, scalar = kept.found[3].pop("deep"), kept.found.pop("scalar")
    assert torch.equal(deep, value[3].pop("deep")) and deep.dtype == torch.bfloat16
    assert torch.equal(scalar, value.pop("scalar")) and kept.found == value and isinstance(kept.found["tuple"], tuple)
