# SPDX-License-Identifier: Apache-2.0
"""Training by pairs: the loss, and that it learns which words matter."""

import torch

from manyheads.models.ranker import RankingModel
from manyheads.strategy import RankerConfig
from manyheads.training.ranking import hinge_loss, train_ranker
from tolerance import CLOSE, assert_close


class Sums(torch.nn.Module):
    """Scores a pair by the sum of the document's ids over that of the query's."""

    def forward(self, queries, documents):
        return documents.sum(1) / queries.sum(1)


def test_the_hinge_is_of_margin_one():
    queries = torch.tensor([[1.0], [2.0], [1.0]])
    better, worse = torch.tensor([[3.0, 0.0], [2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 1)
    worse = torch.cat([worse, torch.zeros(3, 1)], 1)
    # 3 - 1 is beyond the margin; 1.5 - 1 lacks 0.5; 1 - 4 lacks 4
    assert_close(hinge_loss(Sums(), (queries, better, worse)), (0 + 0.5 + 4) / 3, CLOSE)
    assert hinge_loss(Sums(), (queries, worse, better)) > 1  # control


def test_it_learns_to_look_for_the_words_of_the_query():
    torch.manual_seed(0)
    model = RankingModel(
        "tkl_local:chunk=8,overlap=2,regions=1",
        [f"{i}" for i in range(40)],
        RankerConfig(dim=16, heads=2, layers=1, hidden=8),
    )

    def get_batch(step):
        generator = torch.Generator().manual_seed(step)
        query = torch.randint(2, 42, (8, 2), generator=generator)
        other, better = torch.randint(2, 42, (2, 8, 40), generator=generator)
        better[:, 11:13] = query
        return query, better, other

    def right():
        model.eval()
        with torch.no_grad():
            found = [model(q, better) > model(q, worse) for q, better, worse in map(get_batch, range(1000, 1020))]
        return torch.cat(found).float().mean().item()

    torch.nn.init.zeros_(model.ranker.passages.dense.weight)
    assert right() == 0  # no better than the other: nothing is weighed
    state = train_ranker(model, get_batch, 40, lr=3e-3)
    assert right() > 0.8 and sum(state.losses[-5:]) < sum(state.losses[:5])
