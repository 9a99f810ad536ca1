# SPDX-License-Identifier: Apache-2.0
"""What these tests share."""

import pytest

from tiny.joined import make_parts


@pytest.fixture(scope="session")
def parts(tmp_path_factory):
    """Folders of a tiny tower and a tiny decoder."""
    return make_parts(tmp_path_factory.mktemp("parts"))
