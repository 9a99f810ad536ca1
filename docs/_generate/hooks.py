# SPDX-License-Identifier: Apache-2.0
"""What mkdocs calls: generated pages are added, and figures are put into those that are written by hand."""

import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
import measured
import notebooks
import pages


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of strategies, categories and notebooks."""
    for path, text in pages.pages():
        files.append(File.generated(config, path, content=text))
    found = sorted((Path(config.docs_dir) / "notebooks").glob("*.ipynb"))
    with tempfile.TemporaryDirectory() as folder:
        for path, content in notebooks.executed(found, Path(folder), config.extra["execute_notebooks"]):
            files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the figures of a page in."""
    if page.file.generated_by is not None or "{{" not in markdown:
        return markdown
    return measured.render(markdown, costs=measured.render(measured.COSTS.read_text(encoding="utf-8")))
