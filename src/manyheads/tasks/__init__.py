# SPDX-License-Identifier: Apache-2.0
"""What can be measured: one file a task, below the folder of its field, found by its name.

A task loads its data, states its metrics, and gives one value for every sample. ``load("niah_single")`` imports no
other. Tasks that are one benchmark are a family, a folder of their own: ``load("ruler.vt")``.
"""

from __future__ import annotations

import ast
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..experiment.task import Task

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["data_of", "field_of", "given", "load", "names", "summaries"]

_FOLDER = Path(__file__).parent


@cache
def _homes() -> dict[str, str]:
    """Module of each task by its name; helpers begin with an underscore."""
    found = {}
    for path in sorted([*_FOLDER.glob("*/[a-z]*.py"), *_FOLDER.glob("*/[a-z]*/[a-z]*.py")]):
        inside = path.relative_to(_FOLDER).with_suffix("").parts
        found[".".join(inside[1:])] = ".".join((__name__, *inside))
    return found


def field_of(name: str) -> str:
    """Field of a task, which has to be there."""
    return _homes()[name].removeprefix(f"{__name__}.").partition(".")[0]


def names(field: str | None = None) -> list[str]:
    """Names of all tasks, or of those of a field, sorted."""
    return sorted(name for name in _homes() if field in (None, field_of(name)))


def summaries() -> Mapping[str, tuple[str, str]]:
    """Field and first line of the description of every task, by its name; none is imported."""
    found = {}
    for name in names():
        said = ast.get_docstring(_tree(_path(name))) or ""
        found[name] = (field_of(name), said.partition("\n")[0])
    return found


def _path(name: str) -> Path:
    return _FOLDER.joinpath(*_homes()[name].removeprefix(f"{__name__}.").split(".")).with_suffix(".py")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _said(path: Path) -> dict[str, Any]:
    """What the classes of a file say of their data, or else the bases that they have from files beside it."""
    classes = [node for node in _tree(path).body if isinstance(node, ast.ClassDef)]
    bases = {base.id for cls in classes for base in cls.bases if isinstance(base, ast.Name)}
    found: dict[str, Any] = {}
    for node in _tree(path).body:
        if isinstance(node, ast.ImportFrom) and node.level == 1 and bases & {alias.name for alias in node.names}:
            found |= _said(path.parent / f"{node.module}.py")
    return found | {
        node.target.id: ast.literal_eval(node.value)
        for cls in classes for node in cls.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        and node.target.id in ("files", "takes", "published") and node.value is not None
    }  # fmt: skip


def data_of(name: str) -> dict[str, str] | None:
    """What the data of a field's task are; None of a task that says nothing of them. The task is not imported.

    ``data``, ``licence`` and ``origin`` as ``data/files.toml`` has them; ``folder`` is what a folder of the user's own
    holds, and ``absent`` what to do where the data, or a published model that reads them, are not on this machine,
    empty where they are. A task without files makes its data.
    """
    from .. import models
    from ..data import files

    named = _said(_path(name))
    if "files" not in named:
        return None
    if not named["files"]:
        return {
            "data": "made here", "licence": "none needed", "origin": "a simulator of ours", "folder": named["takes"],
            "absent": "",
        }  # fmt: skip
    entries = [files.entry(one) for one in named["files"]]
    last, mine = entries[-1], f"give --data DIR, {named['takes']}"
    absent = ""
    if not any(files.local(one.name) for one in entries):
        url = next((one.url for one in entries if one.url), "")
        absent = f"is fetched when first used, from {url}" if url else f"put {entries[0].path} into $MANYHEADS_DATA"
        absent += f"; or {mine}"
    for name in named.get("published", ()):
        if models.source(name) == (hub := models.published()[name]["hub"]):
            absent += f"{'; ' if absent else ''}needs the model {name}: {hub}, or a folder of it in $MANYHEADS_MODELS"
    return {
        "data": entries[0].name, "licence": last.licence, "origin": last.origin, "folder": named["takes"],
        "absent": absent,
    }  # fmt: skip


def load(name: str) -> type[Task]:
    """The class of the task called ``name``.

    Raises:
        UserError: there is none; the message holds the nearest names.
    """
    from ..catalog import nearest

    if name not in _homes():
        family = [known for known in names() if known.startswith(f"{name}.")]
        close = nearest(name, names())
        raise UserError(
            f"unknown task {name!r}: "
            + (
                f"there are {', '.join(family)}" if family
                else f"did you mean {close[0]}?" if close else f"there are {', '.join(names())}"
            )
        )  # fmt: skip
    module = import_module(_homes()[name])
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Task, not {[c.__name__ for c in found]}")
    return found[0]


def given(text: str) -> tuple[Task, Mapping[str, object]]:
    """The task that ``name`` or ``name:field=value,field=value`` says, and the fields that the text names.

    Raises:
        UserError: there is no such task or field, or the field refuses the value.
    """
    from ..spec import fill, read

    spec = read(text)
    made: Task = fill(load(spec.name), spec)
    return made, {name: getattr(made, name) for name in spec.fields}
