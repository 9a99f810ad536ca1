# SPDX-License-Identifier: Apache-2.0
"""The list of skipped tests is whole and true: a reason that is not on it fails, and each on it is some test's."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from skips import checked, reasons

CALLS = ("skip", "skipif", "importorskip")


def given(text):
    """Reasons of all skips in a source; one that is no plain text is written as code."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CALLS:
            found = [word.value for word in node.keywords if word.arg == "reason"]
            found += node.args[:1] if node.func.attr == "skip" else []
            yield ast.literal_eval(found[0]) if found and isinstance(found[0], ast.Constant) else ast.unparse(node)


def test_every_reason_is_listed_and_every_listed_one_is_given():
    found = {reason for path in Path(__file__).parent.rglob("*.py") for reason in given(path.read_text())}
    assert found == reasons()
    assert list(given('pytest.importorskip("ray")\npytest.skip(f"no {x}")')) == [
        "pytest.importorskip('ray')", "pytest.skip(f'no {x}')"
    ]  # fmt: skip


@pytest.mark.parametrize(("reason", "outcome"), [("there is a GPU", "skipped"), ("not today", "failed")])
def test_a_skip_for_another_reason_fails(reason, outcome):
    made = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file.py", 1, f"Skipped: {reason}"))
    found = checked(made)
    assert found.outcome == outcome and (reason in found.longrepr) == (outcome == "failed")
    assert checked(SimpleNamespace(skipped=False, outcome="passed")).outcome == "passed"


def test_the_hooks_are_in_place(tmp_path):
    """A file and a test that are skipped for no listed reason, in a run of their own."""
    here = Path(__file__).parent
    (tmp_path / "test_file.py").write_text('import pytest\n\npytest.skip("no file today", allow_module_level=True)\n')
    tests = (f'def test_{i}():\n    pytest.skip("{text}")\n' for i, text in enumerate(("not today", "there is a GPU")))
    (tmp_path / "test_some.py").write_text("import pytest\n\n" + "\n".join(tests))
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", here.parent / "pyproject.toml", tmp_path]
    options = ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])}
    found = subprocess.run([*command, *options], capture_output=True, text=True, env=environment).stdout
    assert "1 failed, 1 skipped, 1 error" in found, found
    assert "does not list: not today" in found and "does not list: no file today" in found
