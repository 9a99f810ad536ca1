# SPDX-License-Identifier: Apache-2.0
"""The policy and its attention against their formulas in float64, the losses, freezing, and decisions in use."""

import copy
import math

import numpy as np
import pytest
import torch

from manyheads.domains.language.emma import (
    Emma,
    MonotonicAttention,
    StepwisePolicy,
    context_weights,
    expected_alignment,
    latency_losses,
    preserve_mass,
)
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.language._streaming import stream
from manyheads.tasks.language.simultaneous_translation import SimultaneousTranslation
from tolerance import DEEP, SAME, is_close, is_far, nearly

B, T, S, D, H = 2, 3, 5, 8, 2
LENGTHS = (5, 3)


def randomised(module):
    torch.manual_seed(2)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.5)
    return module.double().eval()


def policy(depth=2, ratio=1):
    return randomised(StepwisePolicy(D, H, depth, -0.5, 0.2, ratio))


@pytest.fixture
def given():
    torch.manual_seed(0)
    mask = torch.arange(S) < torch.tensor(LENGTHS)[:, None]
    return torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, S, D, dtype=torch.float64), mask


def network(layers, x):
    for layer in layers:
        x = (x @ layer.weight.T + layer.bias).clamp(min=0) if isinstance(layer, torch.nn.Linear) else x
    return x


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_probabilities_of_writing(given, ratio):
    """By the formula, one word, position and head at a time; keys are means of what is there."""
    q, x, mask = given
    made = policy(ratio=ratio)
    got, d = made(q, x, mask), D // H
    want = torch.zeros(B, H, T, S, dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        for first in range(0, length, ratio):
            last = min(first + ratio, length)
            key = network(made.k, x[b, first:last].mean(0))
            for t in range(T):
                query = network(made.q, q[b, t])
                for h in range(H):
                    at = slice(h * d, h * d + d)
                    energy = float((query[at] @ key[at] / math.sqrt(d) + made.bias).detach())
                    want[b, h, t, last - 1] = 1 / (1 + math.exp(-energy / 0.2))
    assert is_close(got, want, SAME) and is_far(policy(ratio=ratio % 3 + 1)(q, x, mask), want, SAME)
    assert float(StepwisePolicy(D, H, 4, -0.5, 0.2, 1).bias.detach()) == -0.5 and len(made.q) == 4


def attention(by="scan", ratio=1):
    return randomised(MonotonicAttention(D, H, 0.0, policy(ratio=ratio), by))


def projected(layer, x):
    return (x @ layer.weight.T + layer.bias).unflatten(-1, (H, -1)).transpose(1, 2)


@pytest.mark.parametrize("by", ["scan", "matrix"])
def test_the_attention_that_is_expected(given, by):
    """Where each head stops, a softmax of all up to there: the mean over places, which it never sees past."""
    q, x, mask = given
    made = attention(by)
    got = made(q, [x], [mask])
    asked = made.norm(q)
    alpha = preserve_mass(expected_alignment(made.policy(asked, x, mask)), torch.tensor(LENGTHS)[:, None])
    k, v = projected(made.attend.k, x), projected(made.attend.v, x)
    u = projected(made.attend.q, asked) @ k.mT / math.sqrt(D // H)
    found = torch.zeros(B, H, T, D // H, dtype=torch.float64)
    for stop in range(S):
        found += alpha[..., stop, None] * (u[..., : stop + 1].softmax(-1) @ v[:, :, : stop + 1])
    want = q + made.attend.out(found.transpose(1, 2).flatten(2))
    assert is_close(got, want, SAME) and torch.equal(made.p, made.policy(asked, x, mask))
    assert is_close(made.alpha, alpha, SAME) and is_far(made(q, [x], [mask[:, None].expand(-1, T, -1)]), want, SAME)
    other = torch.where(mask[..., None], x, 9.0)
    assert is_close(made(q, [other], [mask]), got, DEEP)  # padding is not seen
    weights = context_weights(alpha, u, mask[:, None, None])
    assert not weights[1, ..., 3:].any()


def test_with_what_was_read_it_is_the_usual_attention(given):
    q, x, mask = given
    made, seen = attention(), torch.tensor([[1, 2, 4], [2, 2, 3]])
    known = torch.arange(S) < seen[..., None]
    got = made(q, [x], [known])
    assert is_close(got, q + made.attend(made.norm(q), x, known), DEEP)
    p = made.policy(made.norm(q), x, mask)
    want = torch.stack([p[0, :, -1, 3], p[1, :, -1, 2]])
    assert is_close(made.last, want, DEEP) and is_far(made.last, p[:, :, -1, 0], DEEP)
    later = torch.where(torch.arange(S)[:, None] < seen[:, -1, None, None], x, 7.0)
    assert is_close(made(q, [later], [known]), got, DEEP) and is_close(made.last, want, DEEP)
    made.train()
    made.last = torch.empty(0)
    made(q, [x], [known])
    assert not made.last.numel()  # while whole sentences are learned no policy is asked


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = [" ".join(f"w{i}" for i in rng.integers(0, 6, int(rng.integers(2, 8)))) + f" n{k}" for k in range(30)]
    (place / "source.txt").write_text("\n".join(rows))
    (place / "target.txt").write_text("\n".join(row.replace("w", "v") for row in rows))
    return SimultaneousTranslation(
        folder=str(place), dim=16, layers=2, heads=2, batch=4, steps=4, vocabulary=300, dropout=0.0, rates=(1e-2,)
    )


def built(task, recipe):
    torch.manual_seed(0)
    return recipe.build(task, 24).eval()


def test_the_loss_is_of_all_layers_and_heads(task):
    recipe, batch = Emma(latency=0.7, variance=0.3), task.collate(task.judged("test"))
    model = built(task, recipe)
    plain = task.loss(model, batch)
    source, target = batch["mask_0"].sum(1), (batch["next"] >= 0).sum(1)
    terms = [latency_losses(layer.sources.alpha, source, target) for layer in model.decoder]
    lag, variance = (sum(float(x.detach()) for x in term) / 2 for term in zip(*terms, strict=True))
    assert lag > 0.1 and variance > 0.1
    assert recipe.loss(task, model, batch).item() == nearly(
        plain.item() + 0.7 * lag + 0.3 * variance, torch.float32, 512
    )
    assert Emma(latency=0, variance=0).loss(task, model, batch).item() == nearly(plain.item(), torch.float32, 512)


def test_it_starts_from_whole_sentences_and_the_encoder_stands_still(task):
    """The model learns first with all in view and its policies apart; then its encoder's layers change no more."""
    recipe, asked = Emma(before=1.5), {}
    model = built(task, recipe)

    def fit(module, batches, loss, steps):
        batch = batches(np.random.default_rng(0))
        asked.update(steps=steps, same=module is model)
        loss(module, batch).backward()
        whole = batch["mask_0"].sum(1, keepdim=True)
        assert torch.equal(loss(module, batch), task.loss(module, batch, whole))

    recipe.start(task, model, fit)
    assert asked == {"steps": 6, "same": True}
    grads = {name: p.grad is not None for name, p in model.named_parameters()}
    assert all(has == ("policy." not in name) for name, has in grads.items())
    assert recipe.rate_factors() == {"encoders.": 0.0} and Emma(freeze=False).rate_factors() == {}
    Emma(before=0).start(task, model, None)
    assert Emma(before=0).rate_factors() == {}  # what has learned nothing learns


def streamed(task, model, batch, **fields):
    return stream(model, batch, Emma(**fields).reading(model))


def test_thresholds(task):
    """At 0 one piece is read and then all is written but the end; above 1 all is read first."""
    batch = task.collate(task.judged("test")[:2])
    model, length = built(task, Emma()), batch["mask_0"].sum(1, keepdim=True)
    assert torch.equal(streamed(task, model, batch, threshold=1.1).seen, length.expand(-1, 47))
    now = streamed(task, model, batch, threshold=0)
    assert (now.seen == 1).all()
    whole = stream(model, batch, lambda seen, length: length)
    assert torch.equal(streamed(task, model, batch, threshold=1.1).words, whole.words)
    assert (streamed(task, model, batch, threshold=0, wait=3).seen == length.clamp(max=3)).all()
    three = streamed(task, model, batch, threshold=0, writes=3).seen
    want = (torch.arange(47) // 3 + 1).minimum(length)
    assert torch.equal(three, want)
    with pytest.raises(UserError, match="fewer decoder layers"):
        Emma(first_layer=2).reading(model)


@pytest.mark.parametrize(("aggregate", "value"), [("min", 0.1), ("mean", 0.45), ("median", 0.3)])
def test_probabilities_are_aggregated(task, aggregate, value):
    model = built(task, Emma())
    model.decoder[0].sources.last = torch.tensor([[0.1, 0.3]])
    model.decoder[1].sources.last = torch.tensor([[0.9, 0.5]])
    seen, length = torch.tensor([[1, 2]]), torch.tensor([9])
    for shift, wanted in ((-0.01, 2), (0.01, 3)):
        reading = Emma(aggregate=aggregate, threshold=value + shift).reading(model)
        assert reading(seen, length).tolist() == [wanted]
    last = Emma(threshold=0.45, first_layer=1).reading(model)
    assert last(seen, length).tolist() == [2] and Emma(threshold=0.45).reading(model)(seen, length).tolist() == [3]


def test_a_coin_reads_as_often_as_it_says(task):
    model = built(task, Emma())
    for layer in model.decoder:
        layer.sources.last = torch.zeros(4000, 2)
    seen, length = torch.ones(4000, 1, dtype=torch.long), torch.full((4000,), 9)
    share = Emma(by="random", threshold=0.3).reading(model)(seen, length).double().mean() - 1
    assert abs(float(share) - 0.3) < 2 * math.sqrt(0.3 * 0.7 / 4000)
    assert (Emma(threshold=0.3).reading(model)(seen, length) == 2).all()


class Late(torch.nn.Module):
    """Word i is written one position after the one before it; where that had been passed its policy is sure as well."""

    heads = H

    def forward(self, q, x, mask):
        p = torch.full((len(q), H, q.shape[1], x.shape[1]), 0.99)
        return p * (torch.arange(x.shape[1]) != torch.arange(q.shape[1])[:, None]) * mask[:, None, None]


def test_what_mma_misplaces_is_said(task):
    batch, found = task.collate(task.judged("test")[:3]), {}
    for by in ("scan", "matrix", "mma"):
        model, recipe = built(task, Emma(alignment=by)), Emma(alignment=by)
        for layer in model.decoder:
            layer.sources.policy = Late()
        found[by] = [one.misplaced for one in recipe.predict(task, model, batch)]
    assert max(found["scan"] + found["matrix"]) < 1e-6 and min(found["mma"]) > 0.1
    p = model.decoder[0].sources.p
    assert torch.equal(Emma(alignment="mma").expected(p), expected_alignment(p, "mma"))


@pytest.mark.parametrize("by", ["scan", "matrix"])
def test_alignments_stay_in_float32_where_a_model_does_not(task, by):
    """As on a GPU: states are in bfloat16, p and what follows of it are not rounded to that."""
    model, batch = built(task, Emma(alignment=by)), task.collate(task.judged("test")[:2])
    with torch.autocast("cpu", torch.bfloat16):
        loss = task.loss(model, batch)
    block = model.decoder[0].sources
    exact = preserve_mass(expected_alignment(block.p.double()), batch["mask_0"].sum(1, keepdim=True))
    assert block.alpha.dtype == torch.float32 and is_close(block.alpha, exact, SAME) and loss.isfinite()
    rounded = preserve_mass(expected_alignment(block.p.bfloat16()), batch["mask_0"].sum(1, keepdim=True))
    assert is_far(rounded, exact, SAME)


def test_pictures_show_what_heads_expect_to_read(task):
    recipe, batch = Emma(), task.collate(task.judged("test"))
    model = built(task, recipe)
    (picture,) = recipe.pictures(model, batch)
    count = int((batch["next"][0] >= 0).sum())
    assert len(picture.rows) == 2 and len(picture.columns) == count
    values = torch.tensor(picture.values)
    assert (values.diff(dim=1) > -1e-5).all() and values.max() <= batch["mask_0"][0].sum() + 1e-5


def test_weights_of_one_kind_serve_the_others(task):
    """An alignment has no parameters of its own."""
    one = built(task, Emma())
    other = copy.deepcopy(built(task, Emma(alignment="matrix")))
    other.load_state_dict(one.state_dict())
    batch = task.collate(task.judged("test"))
    assert is_close(task.loss(one, batch), task.loss(other, batch), SAME)
    assert parse("emma:alignment=mma,threshold=0.7") == Emma(alignment="mma", threshold=0.7)
