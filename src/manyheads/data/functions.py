# SPDX-License-Identifier: Apache-2.0
"""Functions of Python source and what their docstrings say they do: queries and programs of a search."""

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from .texts import Text

__all__ = ["Function", "documented_functions"]

_WORDS = 5  # of a query at least
_STATEMENTS = 4  # of a function at least, its signature included


@dataclass(frozen=True, slots=True)
class Function:
    """A function without its docstring and comments, as ``ast`` writes it, and the first sentence or line of that.

    Attributes:
        module: name of the text that it is in.
        name: of the function.
        query: what its docstring says first.
        program: its source.
    """

    module: str
    name: str
    query: str
    program: str


def documented_functions(texts: Iterable[Text]) -> list[Function]:
    """All functions of Python files with a docstring that says something, each query and each program once.

    Files that are no Python of this interpreter are passed over, and so are functions of fewer than four statements and
    docstrings whose first paragraph has fewer than five words.
    """
    made: list[Function] = []
    known: set[str] = set()
    for text in texts:
        try:
            tree = ast.parse(text.content)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            query = " ".join((ast.get_docstring(node) or "").strip().split("\n\n")[0].split())
            query = query.split(". ")[0].rstrip(".")
            if len(query.split()) < _WORDS:
                continue
            node.body = node.body[1:]
            if sum(isinstance(part, ast.stmt) for part in ast.walk(node)) < _STATEMENTS:
                continue
            program = ast.unparse(node)
            if known.isdisjoint({query, program}):
                made.append(Function(text.name, node.name, query, program))
            known |= {query, program}
    return made
