# SPDX-License-Identifier: Apache-2.0
"""Model cards, written from the results of a run: no figure in them is typed by hand."""

import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2
import torch
import transformers


def environment(device: str) -> dict[str, str]:
    """Return the hardware and the versions that the figures of a card depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU ({platform.machine()})",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows])


def by_length(figures: list[dict[str, Any]], prefix: str) -> str:
    """Return a table of the figures whose names begin with ``prefix``: a row a name, a column a context length."""
    cells = {(row["name"], row["length"]): row for row in figures if row["name"].startswith(prefix)}
    lengths = sorted({length for _, length in cells})
    rows = []
    for name in dict.fromkeys(name for name, _ in cells):
        found = [cells.get((name, length)) for length in lengths]
        n = next(row["n"] for row in found if row)
        rows.append([name, n, *(f"{row['value']:.3f} ± {row['error']:.3f}" if row else "" for row in found)])
    return table(["", "n", *lengths], rows)


def render(recipe: str, results: dict[str, Any], **more: Any) -> str:
    """Return the card of ``recipe``, whose text is the template of that name beside this file."""
    loader = jinja2.PackageLoader("manyheads.recipes", ".")
    env = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False)
    return env.get_template(f"{recipe}.md.j2").render(**results, **more, table=table, by_length=by_length) + "\n"
