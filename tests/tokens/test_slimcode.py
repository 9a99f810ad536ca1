# SPDX-License-Identifier: Apache-2.0
"""SlimCode: each kind of word has its level, and lower levels go first."""

import manyheads
from manyheads.tokens._programs import read_program
from manyheads.tokens.slimcode import _level
from tiny.tokenizers import words_of

PROGRAM = "def f(a):\n    if b > 3:\n        c = g(d, 4)\n    return h\n"
LEVELS = {
    "def": 7, "f": 7, "b": 6, "if": 2, "3": 2, ">": 0, "c": 4, "=": 0, "g": 5, "d": 5, "4": 3, "return": 1, "h": 4
}  # fmt: skip


def test_levels():
    program = read_program(PROGRAM, words_of())
    found = {p.word: _level(p, program.kinds[p.statement]) for p in program.pieces}
    assert {word: found[word] for word in LEVELS} == LEVELS


def test_lower_levels_go_first():
    program = read_program(PROGRAM, words_of())
    order = manyheads.parse("slimcode").order(program, 5, None)
    levels = [_level(program.pieces[i], program.kinds[program.pieces[i].statement]) for i in order]
    assert levels == sorted(levels) and sorted(order) == list(range(len(program.pieces)))
    assert manyheads.parse("slimcode:budget=7").shorten(PROGRAM, words_of()).text.startswith("def f(a")
