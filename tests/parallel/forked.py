# SPDX-License-Identifier: Apache-2.0
"""Worker scripts of tests: processes forked from one that has imported everything, and what each leaves as JSON."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def start(run, sizes):
    """Have ``run(rank, ranks, folder)`` run in so many processes, for each size in turn; a minute for each."""
    fork = multiprocessing.get_context("fork")
    for ranks in sizes:
        processes = [fork.Process(target=run, args=(rank, ranks, sys.argv[1])) for rank in range(ranks)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        if any(codes):
            sys.exit(f"{ranks} processes ended with {codes}")


def left(worker, folder):
    """What the processes of a worker's script left in a folder, by how many there were and by rank."""
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, worker.__file__, str(folder)], env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return {n: [json.loads((folder / f"{n}-{rank}.json").read_text()) for rank in range(n)] for n in worker.SIZES}
