# SPDX-License-Identifier: Apache-2.0
"""Python programs as statements and words with their number of tokens, and the base of what shortens them.

A program is read by ``ast`` and written anew, a line each statement, without comments and indentation. A compound
statement is its head alone (``for x in y:``); what it holds are statements of their own. Words are parts of identifiers
(``snake_case``, ``camelCase``), numbers and single signs, with the space before them; words that share a token of the
tokenizer at hand are one piece.
"""

import ast
import re
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from textwrap import dedent
from typing import Any

from ..attention.budget import Budget, keep_limit
from ..errors import UserError
from ..text_reducing import Shortened, TextReducer, TextWeights

__all__ = ["CONTROL", "Piece", "Program", "ProgramReducer", "read_program"]

CONTROL = frozenset({"if", "for", "while", "try", "except", "finally", "with", "match"})
_WORD = re.compile(r"[^\S\n]*(?:[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\n])\n?|\n")
_KINDS: dict[type[ast.AST], str] = {
    ast.FunctionDef: "method", ast.AsyncFunctionDef: "method", ast.ClassDef: "method", ast.Return: "return",
    ast.If: "if", ast.For: "for", ast.AsyncFor: "for", ast.While: "while", ast.Try: "try", ast.With: "with",
    ast.AsyncWith: "with", ast.ExceptHandler: "except", ast.Match: "match", ast.match_case: "match",
    ast.Assign: "variable", ast.AnnAssign: "variable", ast.AugAssign: "expression", ast.Raise: "raise",
    ast.Assert: "assert", ast.Import: "import", ast.ImportFrom: "import", ast.Break: "break",
    ast.Continue: "continue", ast.Pass: "pass", ast.Delete: "delete", ast.Global: "scope", ast.Nonlocal: "scope",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """A word of a program.

    Attributes:
        text: with the space before it, and the end of line behind it.
        size: tokens.
        statement: number of its statement.
        called: whether it is of a call.
    """

    text: str
    size: int
    statement: int
    called: bool

    @property
    def word(self) -> str:
        """The word alone, in lower case."""
        return self.text.strip().lower()


@dataclass(frozen=True, slots=True)
class Program:
    """A program in pieces; ``kinds`` has that of each statement."""

    pieces: tuple[Piece, ...]
    kinds: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(piece.text for piece in self.pieces)

    def sizes(self) -> list[int]:
        """Tokens of each statement."""
        made = [0] * len(self.kinds)
        for piece in self.pieces:
            made[piece.statement] += piece.size
        return made


def read_program(text: str, tokenizer: Any) -> Program:
    """Read a program, which may be indented as a whole.

    Raises:
        UserError: it is no Python of this interpreter, or the tokenizer does not say where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            "programs are shortened by where tokens stand, which slow tokenizers do not say: load a fast one"
        )
    try:
        written = ast.unparse(ast.parse(dedent(text)))
        tree = ast.parse(written)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"only Python programs are shortened, and this is none: {error}") from error
    lines = written.split("\n")
    starts = [0, *accumulate(len(line) + 1 for line in lines)]
    called = bytearray(len(written))
    within = {inner for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in within:  # inside f-strings older Pythons have no places
            first, last = (_place(lines, starts, *at) for at in _ends(node))
            called[first:last] = b"\1" * (last - first)
    kinds, of_line = _statements(tree, lines)
    flat = "\n".join(line.lstrip() for line in lines)
    begins = [0, *accumulate(len(line.lstrip()) + 1 for line in lines)]
    offsets = tokenizer(flat, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    pieces = []
    for start, stop, size in _pieces(flat, offsets):
        at = start + len(flat[start:stop]) - len(flat[start:stop].lstrip())
        line = bisect_right(begins, min(at, stop - 1)) - 1
        place = starts[line] + len(lines[line]) - len(lines[line].lstrip()) + at - begins[line]
        pieces.append(Piece(flat[start:stop], size, of_line[line], bool(called[min(place, len(called) - 1)])))
    return Program(tuple(pieces), tuple(kinds))


def _ends(node: ast.Call) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno or node.lineno, node.end_col_offset or 0)


def _place(lines: Sequence[str], starts: Sequence[int], line: int, column: int) -> int:
    """Where in the text a line, from 1, and a column in bytes are."""
    return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())


def _statements(tree: ast.AST, lines: Sequence[str]) -> tuple[list[str], list[int]]:
    """Kinds of statements, and to which each line belongs: its own, or the one that a long string goes on."""
    begin: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            begin |= {decorator.lineno: "annotation" for decorator in node.decorator_list}
        if isinstance(node, ast.match_case):
            begin[node.pattern.lineno] = "match"
        elif isinstance(node, ast.Expr):
            begin[node.lineno] = "function" if isinstance(node.value, ast.Call | ast.Await) else "expression"
        elif isinstance(node, ast.stmt | ast.ExceptHandler):
            begin[node.lineno] = _KINDS.get(type(node), "expression")
    inside = {
        line for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)
        for line in range(node.lineno + 1, (node.end_lineno or 0) + 1)
    }  # fmt: skip
    kinds: list[str] = []
    of_line = []
    for number, line in enumerate(lines, 1):
        head = line.strip()
        if number in begin and number not in inside:
            kinds.append(begin[number])
        elif number not in inside and head in ("else:", "finally:"):
            kinds.append("finally" if head == "finally:" else "if")
        of_line.append(max(0, len(kinds) - 1))
    return kinds or ["expression"], of_line


def _pieces(text: str, offsets: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """Start, end and tokens of the words, those that share a token as one."""
    tokens = sorted((start, stop) for start, stop in offsets if stop > start)
    begin, reach, count, at = 0, 0, 0, 0
    for match in _WORD.finditer(text):
        while at < len(tokens) and tokens[at][0] < match.end():
            reach, count, at = max(reach, tokens[at][1]), count + 1, at + 1
        if reach <= match.end():
            yield begin, match.end(), count
            begin, count = match.end(), 0


@dataclass(frozen=True, kw_only=True)
class ProgramReducer(TextReducer):
    """Drops words of a program, in the order of :meth:`order`, until it has as many tokens as the budget.

    Attributes:
        budget: fraction of the tokens that stay, or their number; a program that has no more stays as it is.
    """

    budget: Budget = field(default=0.6, metadata={"help": "fraction of the tokens that stay, or their number"})

    def read(self, text: str, tokenizer: Any) -> Program:
        return read_program(text, tokenizer)

    @abstractmethod
    def order(self, program: Program, limit: int, weights: TextWeights | None) -> Sequence[int]:
        """Numbers of all pieces, in the order in which they go."""

    def worth(self, program: Program, weights: TextWeights | None) -> tuple[float, ...] | None:
        """What each piece is worth, for pictures."""
        return None

    def shorten(self, text: str, tokenizer: Any, weights: TextWeights | None = None) -> Shortened:
        limit = keep_limit(self.budget, _count(tokenizer, text))
        if _count(tokenizer, text) <= limit:
            return Shortened((text,), (True,))
        program = self.read(text, tokenizer)
        pieces, order = program.pieces, self.order(program, limit, weights)
        left = sum(piece.size for piece in pieces)
        drops = 0
        while left > limit:
            left -= pieces[order[drops]].size
            drops += 1

        def made(drops: int) -> Shortened:
            gone = set(order[:drops])
            kept = tuple(i not in gone for i in range(len(pieces)))
            return Shortened(tuple(piece.text for piece in pieces), kept, self.worth(program, weights))

        while _count(tokenizer, made(drops).text) > limit:  # words that have come together may be other tokens
            drops += 1
        while drops and _count(tokenizer, made(drops - 1).text) <= limit:
            drops -= 1
        return made(drops)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
