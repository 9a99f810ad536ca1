# SPDX-License-Identifier: Apache-2.0
"""Why something cannot be had, in one line."""

import pytest

from manyheads.errors import UserError, refusal


def test_the_first_refusal_is_told():
    called = []

    def refused(words):
        called.append(words)
        raise UserError(words)

    assert refusal() is None and refusal(lambda: 0, dict) is None
    assert refusal(dict, lambda: refused("first"), lambda: refused("second")) == "first" and called == ["first"]
    with pytest.raises(ZeroDivisionError):  # a fault of ours is none of the user's
        refusal(lambda: 1 / 0)
