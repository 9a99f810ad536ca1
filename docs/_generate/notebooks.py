# SPDX-License-Identifier: Apache-2.0
"""Executes the notebooks and makes pages of them. They are kept without outputs, so that what is shown is what runs."""

import base64
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

SECONDS = 240  # of one cell, on a busy machine


def executed(paths: list[Path], folder: Path, execute: bool = True) -> Iterator[tuple[str, str | bytes]]:
    """Pages and pictures of all notebooks: path in the site and content.

    Args:
        paths: of the notebooks.
        folder: to run them in.
        execute: whether to; without, pages show the code alone.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """

    def run(path: Path) -> Any:
        notebook = nbformat.read(path, as_version=4)
        if execute:
            where = {"metadata": {"path": str(folder)}}
            NotebookClient(notebook, timeout=SECONDS, resources=where).execute()
        return notebook

    with ThreadPoolExecutor(2) as pool:
        for path, notebook in zip(paths, pool.map(run, paths), strict=True):
            yield from page(path.stem, notebook)


def page(name: str, notebook: Any) -> Iterator[tuple[str, str | bytes]]:
    """One notebook as a page, and its pictures."""
    parts: list[str] = []
    pictures = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                pictures += 1
                picture = f"{name}-{pictures}.png"
                yield f"notebooks/{picture}", base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({picture})")
            elif "text/html" in data:
                parts.append(data["text/html"])
            elif output.output_type == "stream" and output.name == "stderr":
                continue  # progress of loading
            elif text := _plain(output.get("text") or data.get("text/plain", "")):
                parts.append(f"```text\n{text}\n```")
    parts.append(f"[This page as a notebook]({name}.ipynb)")
    yield f"notebooks/{name}.md", "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).rstrip()
