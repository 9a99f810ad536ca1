# SPDX-License-Identifier: Apache-2.0
"""The picture of a page: the darkest box is what the word gives most to."""

import numpy as np
import pytest
from PIL import Image

from manyheads.errors import UserError
from manyheads.report import page_attention

WORDS, BOXES = ["a", "b", "c"], np.array([[0, 0, 200, 100], [400, 0, 600, 100], [800, 0, 1000, 100]])


def darkest(path, head=0):
    """Which third of the panel of a head is darkest."""
    grey = np.asarray(Image.open(path).convert("L"), float)
    half = grey[:, : grey.shape[1] // 2] if head == 0 else grey[:, grey.shape[1] // 2 :]
    inside = half[60:-20, 12:-12]
    return int(np.argmin([part.mean() for part in np.array_split(inside, 3, axis=1)]))


def test_the_word_that_is_given_most_is_the_darkest(tmp_path):
    weights = np.full((2, 3, 3), 0.05)
    weights[0, 0, 2] = weights[1, 0, 1] = weights[0, 1, 0] = 0.9
    page_attention.save(tmp_path / "page.png", WORDS, BOXES, weights, 0)
    assert (darkest(tmp_path / "page.png"), darkest(tmp_path / "page.png", 1)) == (2, 1)
    page_attention.save(tmp_path / "other.png", WORDS, BOXES, weights, 1)  # control: asked of another word
    assert darkest(tmp_path / "other.png") == 0


def test_errors(tmp_path):
    weights = np.ones((1, 3, 3)) / 3
    for given in ((WORDS[:2], BOXES, weights, 0), (WORDS, BOXES, weights[0], 0), (WORDS, BOXES, weights, 3)):
        with pytest.raises(UserError, match="words have boxes"):
            page_attention.save(tmp_path / "page.png", *given)
    with pytest.raises(UserError, match="a picture"):
        page_attention.save(tmp_path / "page.txt", WORDS, BOXES, weights, 0)
