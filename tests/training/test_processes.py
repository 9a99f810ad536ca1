# SPDX-License-Identifier: Apache-2.0
"""Two processes that take one batch each are one process that accumulates two."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from manyheads.errors import UserError
from manyheads.training import Checkpoint, fit
from manyheads.training.processes import Processes, accelerated


def train(out, accumulate, accelerate, folder=None):
    """Train from fixed weights, and write them and the losses to ``out`` if this is the first process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    numbers = []

    def get_batch(number):
        numbers.append(number)
        return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(number))

    state = fit(
        model, get_batch, lambda net, x: (net(x) - x[:, :2]).square().mean(), budget=4, optimizers=[optimizer],
        accumulate=accumulate, accelerate=accelerate, tokens_of=len,
        checkpoint=Checkpoint(Path(folder), every=2) if folder else None,
    )  # fmt: skip
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    result = {"weights": weights, "losses": state.losses, "tokens": state.tokens, "numbers": numbers}
    if int(os.environ.get("RANK", "0")) == 0:
        Path(out).write_text(json.dumps(result))
    return result


def close(a, b):
    return all(a[name] == pytest.approx(b[name], abs=1e-12) for name in ("weights", "losses", "tokens"))


def test_two_processes_are_twice_the_batches(tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra [train]")
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_processes as t; "
    code += f"t.train({str(tmp_path / 'out')!r}, 2, True, {str(tmp_path / 'kept')!r})"
    script = tmp_path / "script.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out").read_text())
    wanted = train(tmp_path / "one", 4, False)
    assert close(found, wanted) and found["tokens"] == 80
    assert not close(found, train(tmp_path / "fewer", 2, False))
    assert found["numbers"] == [0, 2, 4, 6, 8, 10, 12, 14] and wanted["numbers"] == list(range(16))
    kept = {path.name for path in (tmp_path / "kept" / "step-00000004").iterdir()}
    assert {"model.safetensors", "state.json", "process-0.json", "process-1.json"} <= kept


def test_one_process_by_accelerate_is_one_without(tmp_path):
    pytest.importorskip("accelerate", reason="needs the extra [train]")
    assert train(tmp_path / "a", 1, True) == train(tmp_path / "b", 1, False)


def test_what_is_missing_or_elsewhere_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=r"manyheads\[train\]"):
        accelerated(torch.device("cpu"))


def test_alone_everything_is_its_own():
    alone, model = Processes(), nn.Linear(1, 1)
    assert (
        alone.wrap(model) is model
        and alone.total(3.0) == alone.of_first(3.0) == 3
        and alone.mean(model.bias) is model.bias
    )
