# SPDX-License-Identifier: Apache-2.0
"""Which of many like cases are run always; the others are slow, and run before a release."""

from collections.abc import Iterable
from typing import Any

import pytest


def spread(names: str | tuple[str, ...], cases: Iterable[Any], quick: int, **options: Any) -> pytest.MarkDecorator:
    """``parametrize`` whose first case, last case and ``quick - 2`` evenly between them are run always."""
    every = list(cases)
    assert 1 < quick < len(every), "all of them would be run"
    kept = {round(i * (len(every) - 1) / (quick - 1)) for i in range(quick)}
    params = []
    for i, case in enumerate(every):
        values = (case,) if isinstance(names, str) else case
        params.append(pytest.param(*values, marks=() if i in kept else pytest.mark.slow))
    return pytest.mark.parametrize(names, params, **options)
