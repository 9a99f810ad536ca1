# SPDX-License-Identifier: Apache-2.0
"""polyencoder: vectors and scores against their formula, its degenerate cases, padding, and what learns."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from manyheads.domains.language.polyencoder import PolyAttention, Polyencoder
from manyheads.domains.language.text_match import TextMatch
from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.spec import parse
from manyheads.tasks._field_training import FieldTraining
from manyheads.tasks.language._selection import Pooled
from manyheads.training.matching import parameters_of
from tiny.dialogues import selection
from tolerance import FORMULA, SAME, is_close, is_far

__all__ = ["selection"]

B, N, D, M, C = 3, 9, 8, 4, 5


@pytest.fixture
def texts():
    """States, which of them are there (lengths 9, 5 and 3), and candidates."""
    torch.manual_seed(0)
    mask = torch.arange(N) < torch.tensor([[9], [5], [3]])
    return torch.randn(B, N, D, dtype=torch.float64), mask, torch.randn(B, C, D, dtype=torch.float64)


def scored(made, states, mask, replies):
    return made.scores(*made.vectors(states, mask), replies)


def by_formula(codes, states, mask, replies, scale=1.0, weigh=True):
    """The paper's three lines, number by number."""
    found = torch.empty(B, C, dtype=torch.float64)
    for b in range(B):
        h = states[b, mask[b]]
        y = []
        for c in codes:
            e = torch.stack([torch.exp(scale * (c @ one)) for one in h])
            y.append(sum(w * one for w, one in zip(e / e.sum(), h, strict=True)))
        for k, reply in enumerate(replies[b]):
            e = torch.stack([torch.exp(reply @ one) if weigh else torch.ones(()).double() for one in y])
            found[b, k] = sum(w * one for w, one in zip(e / e.sum(), y, strict=True)) @ reply
    return found


def test_scores_are_the_formula(texts):
    made = PolyAttention(M, D).double()
    found, codes = scored(made, *texts), made.codes.detach()
    assert is_close(found, by_formula(codes, *texts), FORMULA)
    states, mask, replies = texts
    for wrong in (
        by_formula(codes, *texts, scale=D**-0.5), by_formula(codes, *texts, weigh=False),
        by_formula(codes, states, torch.ones_like(mask), replies), by_formula(-codes, *texts),
    ):  # fmt: skip
        assert is_far(found, wrong, FORMULA)


def test_one_code_is_a_bi_encoder_that_pools_by_attention(texts):
    states, mask, replies = texts
    made = PolyAttention(1, D).double()
    weights = (states @ made.codes[0]).masked_fill(~mask, -torch.inf).softmax(1)
    pooled = (weights[..., None] * states).sum(1)
    assert is_close(scored(made, *texts), (replies @ pooled[..., None])[..., 0], FORMULA)
    plain = Pooled("mean")
    assert is_far(scored(made, *texts), scored(plain, *texts), FORMULA)
    with torch.no_grad():
        made.codes.zero_()
    assert is_close(scored(made, *texts), scored(plain, *texts), FORMULA)  # a code of zeros is the mean


def test_equal_codes_are_one_and_their_order_says_nothing(texts):
    one, many = PolyAttention(1, D).double(), PolyAttention(M, D).double()
    before = scored(many, *texts)
    with torch.no_grad():
        many.codes.copy_(many.codes.flip(0))
    assert is_close(scored(many, *texts), before, FORMULA)
    with torch.no_grad():
        many.codes.copy_(one.codes.expand(M, -1))
    assert is_close(scored(many, *texts), scored(one, *texts), FORMULA) and is_far(before, scored(one, *texts), FORMULA)


def test_outputs_are_taken_for_vectors(texts):
    states, mask, _ = texts
    first, there = PolyAttention(M, D, "first").vectors(states, mask)
    assert torch.equal(first[:2], states[:2, :M]) and torch.equal(first[2, :3], states[2, :3])
    assert there.tolist() == [[True] * 4, [True] * 4, [True, True, True, False]]
    last, there = PolyAttention(M, D, "last").vectors(states, mask)
    assert torch.equal(last[0], states[0, 5:9]) and torch.equal(last[1], states[1, 1:5])
    assert torch.equal(last[2, :3], states[2, :3]) and there[2].tolist() == [True, True, True, False]
    assert is_close(scored(PolyAttention(1, D, "first"), *texts), scored(Pooled("first"), *texts), FORMULA)
    assert is_far(scored(PolyAttention(1, D, "last"), *texts), scored(Pooled("first"), *texts), FORMULA)


@pytest.mark.parametrize("codes", ["learned", "fixed", "first", "last"])
def test_padding_changes_nothing(texts, codes):
    """Neither what stands in it nor where it is, also in front; and a vector that is not there has no weight."""
    states, mask, replies = texts
    made = PolyAttention(M, D, codes).double()
    found = scored(made, *texts)
    noise = torch.where(mask[..., None], states, 100 * torch.randn_like(states))
    assert is_close(scored(made, noise, mask, replies), found, FORMULA)
    before = torch.cat((torch.randn(B, 2, D, dtype=torch.float64), states), 1)
    hidden = torch.cat((torch.zeros(B, 2, dtype=torch.bool), mask), 1)
    assert is_close(scored(made, before, hidden, replies), found, FORMULA)
    assert is_far(scored(made, noise, torch.ones_like(mask), replies), found, FORMULA)  # control


def test_replies_that_are_kept_score_the_same(selection):
    """Contexts are read once, replies once; all pairs of a batch are those of each pair alone."""
    torch.manual_seed(0)
    model = Polyencoder(m=M).build(selection, 16).eval()
    samples = selection.draw(np.random.default_rng(0), selection.samples("train"))
    batch = selection.collate(samples)
    with torch.no_grad():
        whole, kept = model(batch), model.replies(batch["replies"], batch["reply_mask"])
        for i, sample in enumerate(samples):
            alone = selection.collate([dataclasses.replace(sample, about={"others": ()})])
            vectors, there = model.contexts(alone["inputs"], alone["mask"])
            assert is_close(model.match.scores(vectors, there, kept[None])[0], whole[i], SAME)
            assert is_close(model(alone)[0, 0], whole[i, batch["right"][i]], SAME)
        assert is_far(whole[0], whole[1], SAME)


def test_the_loss_is_of_the_replies_of_a_batch(selection):
    torch.manual_seed(0)
    recipe = Polyencoder(m=M)
    model = recipe.build(selection, 16).eval()
    batch = selection.collate(selection.draw(np.random.default_rng(0), selection.samples("train")))
    scores = model(batch).detach()
    assert scores.shape == (selection.batch, selection.batch) and batch["right"].tolist() == [0, 1, 2]
    want = torch.stack([scores[i].logsumexp(0) - scores[i, i] for i in range(selection.batch)]).mean()
    assert is_close(recipe.loss(selection, model, batch), want, SAME)
    assert is_far(cross_entropy(scores.mT, batch["right"]), want, SAME)  # of contexts for a reply: another loss


def trained(task, spec):
    run = RunContext(Trainable(), (Arm("bi"), Arm("own", spec)), device=torch.device("cpu"))
    training = FieldTraining(task, run, Arm("own", spec))
    torch.manual_seed(0)
    return training.train(0, 3e-3).model


def test_fixed_codes_stay_and_learned_ones_move(selection):
    with torch.random.fork_rng():
        fixed, learned, fast = (
            trained(selection, f"polyencoder:m=4,{fields}") for fields in ("codes=fixed", "rate=1", "rate=10")
        )
    start = fixed.match.codes  # the same draws for all three
    assert "match.codes" in fixed.state_dict() and not fixed.match.codes.requires_grad
    moved = [float((one.match.codes.detach() - start).norm()) for one in (learned, fast)]
    assert 0 < 3 * moved[0] < moved[1]
    assert parameters_of(fixed) == parameters_of(learned)


def test_codes_are_counted_and_outputs_learn_nothing(selection):
    sizes = {kind: parameters_of(Polyencoder(m=4, codes=kind).build(selection, 16)) for kind in ("learned", "last")}
    plain = parameters_of(selection.reference(16))
    assert sizes == {"learned": plain + 4 * selection.dim, "last": plain}


def test_codes_are_shown_over_tokens(selection):
    recipe = Polyencoder(m=12)
    torch.manual_seed(0)
    model = recipe.build(selection, 16).eval()
    batch = selection.collate(selection.judged("test")[:2])
    with torch.no_grad():
        (picture,) = recipe.pictures(model, batch)
    assert len(picture.rows) == 8 and picture.columns[0] == "[CLS]" and picture.columns[-1] == "[SEP]"
    assert len(picture.columns) == int(batch["mask"][0].sum())
    assert all(abs(sum(row) - 1) < 1e-5 for row in picture.values)
    assert Polyencoder(codes="last").pictures(model, batch) == ()


def test_a_pool_of_the_first_output_is_of_candidates(selection):
    torch.manual_seed(0)
    model = Polyencoder(m=2, pool="first").build(selection, 16).eval()
    batch = selection.collate(selection.judged("test")[:2])
    with torch.no_grad():
        states = model.encoder(batch["replies"], batch["reply_mask"])
        kept = model.replies(batch["replies"], batch["reply_mask"])
    assert torch.equal(kept, states[:, 0]) and is_far(kept, states.mean(1), SAME)


@pytest.mark.parametrize("spec", ["m=0", "codes=other", "pool=max", "rate=0"])
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="polyencoder"):
        parse(f"polyencoder:{spec}")


def test_it_is_of_tasks_that_score_replies(monkeypatch):
    class Other:
        dim, name = 8, "other"

        def reference(self, width):
            return torch.nn.Linear(8, width)

    with pytest.raises(UserError, match="response_selection"):
        Polyencoder().build(Other(), 8)
    with pytest.raises(UserError, match="response_selection"):
        list(TextMatch().run(Other(), np.random.default_rng(0)))
