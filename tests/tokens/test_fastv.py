# SPDX-License-Identifier: Apache-2.0
"""FastV: what is hidden is what words looked at least, in later layers alone; in models, see test_visual_redundancy."""

import torch

from manyheads.reducing import ImageTokens
from manyheads.tokens.fastv import FastV


def test_the_least_attended_are_hidden_and_stay_so():
    columns = torch.tensor([[False, True, True, True, True, False, False]])
    images = ImageTokens(columns=columns, real=torch.ones(1, 7, dtype=torch.bool))
    rows = torch.zeros(1, 7, 7)
    rows[0, 5, 1:5] = torch.tensor([0.1, 0.4, 0.3, 0.2])
    rows[0, 6, 1:5] = torch.tensor([0.3, 0.1, 0.0, 0.3])
    rows[0, 2, 1] = 9.0  # image tokens have no say
    strategy = FastV(start=1, keep=0.5)
    assert strategy.hidden(rows, images, 0)[0, 3].tolist() == [False, True, False, True, False, False, False]
    images.real[0, 6] = False  # padding has none either
    assert strategy.hidden(rows, images, 0)[0, 3].tolist() == [False, True, False, False, True, False, False]
    images.columns = torch.cat([columns, columns[:, :1]], 1)
    later = strategy.hidden(torch.zeros(1, 1, 8), images, 0)
    assert later[0, 0].tolist() == [False, True, False, False, True, False, False, False]
