# SPDX-License-Identifier: Apache-2.0
"""The verb under torchrun uses the processes that are there: the first one reports, the others serve it and end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

SOURCE = str(Path(__file__).parents[2] / "src")


def torchrun(folder, *given):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "manyheads",
    ]
    told = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}
    run = [*command, "parallel", "--tokens", "64", "--masks", "causal", "--methods", "ring,ulysses", *given]
    return subprocess.run(run, cwd=folder, env=told, capture_output=True, text=True, timeout=120, check=False)


def test_one_process_reports_for_all(tmp_path):
    done = torchrun(tmp_path, "--json", "--out", "run")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)  # one document: the other process says nothing
    assert found["setting"]["ranks"] == 2 and {row["method"] for row in found["rows"]} == {"ring", "ulysses"}
    assert all(row["error"] < 1e-4 and row["formula_gap"] == 0 for row in found["rows"])


@pytest.mark.slow
def test_another_number_of_processes_is_refused(tmp_path):
    done = torchrun(tmp_path, "--world", "3")
    assert done.returncode != 0 and "torchrun has started 2 processes: give --world 2" in done.stderr
