# SPDX-License-Identifier: Apache-2.0
"""What a classifier costs: bytes kept for the backward and products, against what can be counted by hand."""

import torch
from torch import nn

from manyheads.experiment import Arm
from manyheads.models.classifier import Classifier, ClassifierConfig
from manyheads.tasks.training.classifier_cost import ClassifierCost, kept_bytes, products

from .conftest import MODEL, SOFTMAX, values

CONFIG = ClassifierConfig(256, 16, 1, 2, hidden=24, length=64, classes=2)


def test_kept_bytes_are_those_of_what_backward_reads():
    layer, x = nn.Linear(8, 8), torch.randn(4, 8)
    assert kept_bytes(layer, x.requires_grad_(True)) == 4 * 8 * 4  # the input, not the weight
    twice = nn.Sequential(layer, nn.Tanh())
    assert kept_bytes(twice, x) == 2 * 4 * 8 * 4  # and what tanh gave

    class Squares(nn.Module):
        def forward(self, x):
            y = 2 * x
            return y * y  # one storage, saved for both factors

    assert kept_bytes(Squares(), x) == 4 * 8 * 4


class Dense(nn.Module):
    """Attention by its matrix."""

    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


def test_products_are_counted_with_all_pairs_and_flash_keeps_none_of_them():
    n, d = 64, 16
    ids = torch.randint(256, (1, n))
    hidden, classes = 24, 2
    linear = 2 * n * (4 * d * d + 3 * d * hidden) + 2 * d * classes
    assert products(Classifier("softmax:position=none", CONFIG), ids) == linear + 4 * n * n * d
    assert products(Classifier("maelre:merge=none", CONFIG), ids) == linear + 4 * n * d * (d // 2)
    flash = [kept_bytes(Classifier("softmax:position=none", CONFIG), torch.zeros(1, m).long()) / m for m in (64, 512)]
    assert flash[1] < 1.02 * flash[0]
    dense = [kept_bytes(Dense(), torch.randn(1, m, 8, requires_grad=True)) / m for m in (64, 512)]
    assert dense[1] > 4 * dense[0]  # control


def test_merging_costs_less_at_every_length(measured):
    task = ClassifierCost(**{**MODEL, "layers": 3}, length=32, times=(1, 4), tokens=128, rounds=1)
    results = measured(task, arms=(SOFTMAX, Arm("maelre", "maelre"), Arm("linear", "maelre:merge=none")))
    for metric in ("kept", "products"):
        found = {}
        for arm, sample, _, at, value in values(results, metric):
            found.setdefault((arm, at["times"]), {})[sample] = value
        assert len(found) == 6 and all(len(x) == (3 if metric == "kept" else 1) for x in found.values())
        for times in (1, 4):
            full, merged, linear = (max(found[arm, times].values()) for arm in ("softmax", "maelre", "linear"))
            assert merged < linear <= full * 1.02
    assert len(values(results, "token_time")) == 6
