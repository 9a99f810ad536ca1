# SPDX-License-Identifier: Apache-2.0
"""Functions with what their docstrings say: without these, each once, short ones left out."""

from manyheads.data.functions import documented_functions
from manyheads.data.texts import Text

BODY = "    a = 1\n    b = a  # why\n    return b\n"
SOURCE = f'''
def one(x):
    """Says what it does here. And more.

    And more.
    """
{BODY}
class C:
    async def two(self):
        """Does something else
        in two lines"""
    {BODY.replace(chr(10), chr(10) + "    ").rstrip(" ")}
def twice(x):
    """Says what it does here."""
{BODY}
def short(x):
    """Says what it does, all of it."""
    return x
def silent(x):
    """Too few words."""
{BODY}'''


def test_functions_of_a_file():
    found = documented_functions([Text("m.py", SOURCE), Text("bad.py", "def ("), Text("again.py", SOURCE)])
    assert [(f.module, f.name, f.query) for f in found] == [
        ("m.py", "one", "Says what it does here"), ("m.py", "two", "Does something else in two lines"),
    ]  # fmt: skip
    assert found[0].program == "def one(x):\n    a = 1\n    b = a\n    return b"
