# SPDX-License-Identifier: Apache-2.0
"""Processes begin with what is set now, wherever they were forked from, and one that fails says so."""

import multiprocessing
import os

from manyheads.workers import started


def answer(pipe, name):
    pipe.send((os.environ.get(name), os.getpid()))


def fail():
    raise SystemExit(3)


def test_variables_are_those_of_the_start(monkeypatch):
    found = []
    for value in ("first", "second", None):
        if value is None:
            monkeypatch.delenv("MANYHEADS_ANSWER")
        else:
            monkeypatch.setenv("MANYHEADS_ANSWER", value)
        mine, theirs = multiprocessing.Pipe()
        process = started(answer, (theirs, "MANYHEADS_ANSWER"))
        theirs.close()
        found.append(mine.recv())
        process.join(60)
        assert process.exitcode == 0
    assert [value for value, _ in found] == ["first", "second", None]
    assert len({pid for _, pid in found} | {os.getpid()}) == 4


def test_a_failure_is_seen_from_outside():
    process = started(fail, ())
    process.join(60)
    assert process.exitcode == 3
