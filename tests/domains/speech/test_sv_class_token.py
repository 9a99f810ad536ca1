# SPDX-License-Identifier: Apache-2.0
"""Class tokens, product-key memory and distillation against their formulas in float64, each with a wrong variant."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm

from manyheads.domains.speech.sv_class_token import (
    Block,
    Distilled,
    ProductKeyMemory,
    SvClassToken,
    TokenEncoder,
    distillation,
    erased,
)
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.speech._verification import Classified, MeanPool, SpeakerEncoder
from manyheads.training.matching import parameters_of
from tolerance import DEEP, DRAWN, PROJECTED, WRONG, error, is_close, is_far

B, T, D, H = 2, 7, 16, 2
MASK = torch.ones(B, T, dtype=torch.bool)
MASK[1, 5:] = False


class Task:
    """As much of a task as the recipe asks for."""

    dim, layers, heads, dropout = D, 2, H, 0.0

    def around(self, blocks):
        return SpeakerEncoder(blocks, D, 0.0, MeanPool())

    def learner(self, model):
        return Classified(model, D, 5)

    def loss(self, model, batch):
        logits = model(batch["inputs"].flatten(0, 1), batch["mask"].flatten(0, 1))
        return torch.nn.functional.cross_entropy(logits, batch["targets"].flatten())


@pytest.fixture
def x():
    return torch.randn(B, T, D, dtype=torch.float64)


@pytest.fixture
def speech():
    """Frames of two recordings, the second shorter, and their mask."""
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[1, 24:] = False
    return torch.randn(2, 40, 40, dtype=torch.float64), mask


def built(**fields):
    torch.manual_seed(1)
    return SvClassToken(**fields).build(Task(), 8).double().eval()


def slots(memory, h):
    """Every slot's score for each memory head, ``[heads, n^2]``, from keys that are joined out of two halves."""
    n, size = memory.keys[0].shape[1], sum(memory.halves)
    found = []
    for head in range(memory.heads):
        rows = slice(head * size, (head + 1) * size)
        q = memory.query.weight[rows] @ h + memory.query.bias[rows]
        keys = [torch.cat((memory.keys[0][head, i], memory.keys[1][head, j])) for i in range(n) for j in range(n)]
        found.append(torch.stack(keys) @ q)
    return torch.stack(found)


@pytest.mark.parametrize("size", [8, 9])
def test_a_memory_reads_the_likeliest_slots_of_all(x, size):
    memory = ProductKeyMemory(D, 12, size, 3, 2).double()
    got, other = memory(x), ProductKeyMemory(D, 12, size, 144, 2).double()
    other.load_state_dict(memory.state_dict())
    for b in range(B):
        for t in range(T):
            want = dense = torch.zeros(D, dtype=torch.float64)
            for scores in slots(memory, x[b, t]):
                top = scores.topk(3)
                want = want + top.values.softmax(0) @ memory.values[top.indices]
                dense = dense + scores.softmax(0) @ memory.values
            assert is_close(got[b, t], want, PROJECTED) and is_far(got[b, t], dense, PROJECTED)
            assert is_close(other(x)[b, t], dense, PROJECTED)  # k of all slots: attention over n^2 keys
    read = memory.found(x)[0].unique()
    (gradient,) = torch.autograd.grad(got.square().sum(), memory.values)
    assert 0 < len(read) < 144 and gradient[read].abs().sum(1).min() > 0
    assert gradient.abs().sum(1).count_nonzero() == len(read)


@pytest.mark.parametrize("memory", [True, False])
def test_a_block_is_its_formula(x, memory):
    block = Block(SvClassToken(memory=memory), Task(), 8).double().eval()
    with torch.no_grad():
        for norm in block.norms:
            norm.weight.normal_()
            norm.bias.normal_()
    a = block.attention
    q, k, v = (x @ a.in_proj_weight.T + a.in_proj_bias).chunk(3, -1)
    mixed = torch.zeros_like(x)
    for b in range(B):
        for head in range(H):
            part = slice(head * D // H, (head + 1) * D // H)
            for t in range(T):
                scores = torch.stack([q[b, t, part] @ k[b, s, part] for s in range(T) if MASK[b, s]])
                mixed[b, t, part] = (scores / math.sqrt(D / H)).softmax(0) @ v[b, MASK[b], part]
    first, second = block.norms
    h = layer_norm(x + a.out_proj(mixed), (D,), first.weight, first.bias)
    want = layer_norm(h + block.second(h), (D,), second.weight, second.bias)
    assert is_close(block(x, MASK), want, DEEP)
    before = x + a.out_proj(mixed)  # as if norms came first
    assert is_far(block(x, MASK), before + block.second(layer_norm(before, (D,))), DEEP)


def test_all_that_a_layer_adds_is_dropped_out(x):
    class Dropping(Task):
        dropout = 1.0

    block = Block(SvClassToken(), Dropping(), 8).double().train()
    first, second = block.norms
    assert is_close(block(x, MASK), second(first(x)), PROJECTED) and is_far(
        block.eval()(x, MASK), second(first(x)), DEEP
    )


def test_a_token_that_looks_at_all_alike_is_a_mean(x):
    attention = Block(SvClassToken(), Task(), 8).double().eval().attention
    with torch.no_grad():
        attention.in_proj_weight.zero_()
        attention.in_proj_bias.zero_()
        attention.in_proj_weight[2 * D :] = torch.eye(D)
        attention.out_proj.weight.copy_(torch.eye(D))
    token = torch.randn(B, 1, D, dtype=torch.float64)
    both = torch.cat((token, x), 1)
    out = attention(both, both, both)[0][:, 0]
    assert is_close(out, both.mean(1), PROJECTED) and is_far(out, x.mean(1), PROJECTED)


@pytest.mark.parametrize("fields", [{"distil": False}, {}, {"pooling": "mean", "distil": False}])
def test_order_is_told_by_positions_alone(speech, fields):
    """Without positions neither pooling knows the order of what the first block is given."""
    frames, mask = speech
    mask = torch.ones_like(mask)
    order = torch.randperm(10)
    for positions in (False, True):
        model = built(positions=positions, **fields)
        encoder = getattr(model, "encoder", model)
        bare = encoder.front

        def shuffled(frames, mask, encoder=encoder, bare=bare, positions=positions):
            encoder.positions = False
            x, there = bare(frames, mask)
            places = bare(torch.zeros_like(frames), mask)[0] * 0
            if positions:
                encoder.positions = True
                places = bare(frames, mask)[0] - x
            return x[:, order] + places, there

        plain = model(frames, mask)
        encoder.front = shuffled
        same = error(model(frames, mask), plain)
        assert (same > 1e-3) if positions else (same <= DEEP), (positions, same)


@pytest.mark.parametrize("fields", [{}, {"distil": False}, {"combine": "embeddings"}])
def test_padding_reaches_no_state(speech, fields):
    frames, mask = speech
    model = built(**fields)
    alone, together = model(frames[1:, :24], mask[1:, :24]), model(frames, mask)
    assert together.shape == (2, 2 if not fields or "combine" in fields else 1, D)
    assert is_close(together[1:], alone, DEEP)
    filled = torch.where(mask[..., None], frames, 1e3)
    assert is_close(model(filled, mask)[1:], alone, DEEP)
    assert is_far(model(filled, torch.ones_like(mask))[1:], alone, DEEP)


def test_tokens_are_sampled_in_training_and_averaged_in_use(speech):
    frames, mask = speech
    model = built(tokens=4, distil=False)
    means = model.tokens.mean(0)
    one = built(tokens=1, distil=False)
    one.load_state_dict({**model.state_dict(), "tokens": means[None]})
    assert is_close(model(frames, mask), one(frames, mask), DEEP)
    assert is_close(one.train()(frames, mask), one.eval()(frames, mask), DEEP)  # R = 1 is a plain class token
    model.combine = "embeddings"
    each = []
    for token in model.tokens:
        one.load_state_dict({**model.state_dict(), "tokens": token[None]})
        each.append(one(frames, mask))
    assert is_close(model(frames, mask), torch.stack(each).mean(0), DEEP)
    assert is_far(model(frames, mask), each[0], DEEP)


def test_tokens_are_drawn_alike():
    model, drawn, count = built(tokens=5, distil=False).train(), [], 4000
    model._states = lambda x, mask, tokens: drawn.append(tokens) or tokens[:, None]
    model.encoder.front = lambda frames, mask: (frames, mask)
    torch.manual_seed(0)
    model(torch.zeros(count, 1, D, dtype=torch.float64), torch.ones(count, 1, dtype=torch.bool))
    which = torch.cdist(drawn[0], model.tokens).argmin(1)
    chance = math.sqrt(0.2 * 0.8 / count)  # expected error of a share
    shares = which.bincount(minlength=5) / count
    assert (shares - 0.2).square().mean().sqrt() <= DRAWN * chance
    uneven = (torch.randint(6, (count,)) % 5).bincount(minlength=5) / count  # the first twice as often
    assert (uneven - 0.2).square().mean().sqrt() > WRONG * chance


def test_distillation_is_its_formula():
    taught = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    said = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    found = distillation(taught, said, 2.0)
    p, q = (taught / 2).softmax(-1), (said / 2).softmax(-1)
    want = 4 * (p * (p.log() - q.log())).sum(-1).mean()
    assert is_close(found, want, PROJECTED)
    assert is_far(found, 4 * (q * (q.log() - p.log())).sum(-1).mean(), PROJECTED)  # the other direction
    gradients = torch.autograd.grad(found, (taught, said), allow_unused=True)
    assert gradients[0] is None and is_close(gradients[1], 2 * (q - p) / 3, DEEP)
    same = said.detach().clone().requires_grad_()
    equal = distillation(said, same, 2.0)
    assert abs(equal.item()) < 1e-14 and torch.autograd.grad(equal, same)[0].abs().max() < 1e-14


def test_a_teacher_is_trained_alongside_and_left_behind(speech):
    frames, mask = speech
    recipe, task = SvClassToken(tokens=3), Task()
    model = recipe.build(task, 8).double()
    learner = recipe.learner(task, model, 8).double()
    assert isinstance(learner, Distilled) and learner.student.model is model
    assert isinstance(learner.teacher.model, TokenEncoder) and learner.teacher.model.distillation is None
    assert len(learner.teacher.model.tokens) == 1
    assert parameters_of(learner) > 1.9 * parameters_of(model)
    batch = {
        "inputs": frames.unflatten(0, (1, 2)), "mask": mask.unflatten(0, (1, 2)), "targets": torch.tensor([[1, 3]])
    }  # fmt: skip
    torch.manual_seed(0)
    loss = recipe.loss(task, learner.eval(), batch)
    torch.manual_seed(0)
    taught = learner.teacher(erased(batch["inputs"]).flatten(0, 1), mask)
    states, y = model(frames, mask), torch.tensor([1, 3])
    p, q = taught.softmax(-1), learner.imitates(states[:, 1]).softmax(-1)
    ce = [-z.log_softmax(-1)[range(2), y].mean() for z in (learner.student.head(states[:, 0]), taught)]
    term = (p * (p.log() - q.log())).sum(-1).mean()
    assert error(loss, ce[0] + ce[1] + term) < 1e-6 < 0.01 < error(loss, ce[0] + ce[1])
    torch.manual_seed(0)
    weighed = SvClassToken(tokens=3, weight=0.3, temperature=2.0).loss(task, learner, batch)
    p, q = (taught / 2).softmax(-1), (learner.imitates(states[:, 1]) / 2).softmax(-1)
    assert error(weighed, ce[0] + ce[1] + 0.3 * 4 * (p * (p.log() - q.log())).sum(-1).mean()) < 1e-6
    loss.backward()
    own = [w.grad.clone() for w in learner.teacher.parameters()]
    learner.zero_grad()
    torch.manual_seed(0)
    taught = learner.teacher(erased(batch["inputs"]).flatten(0, 1), mask)
    torch.nn.functional.cross_entropy(taught.float(), y).backward()
    again = [w.grad for w in learner.teacher.parameters()]
    assert all(error(a, b) < 1e-5 for a, b in zip(own, again, strict=True) if b.abs().max() > 1e-12)


def test_what_is_erased_is_one_rectangle():
    frames = torch.rand(200, 30, 12) + 1
    out = erased(frames)
    gone = out == 0
    assert torch.equal(out[~gone], frames[~gone])
    rows, columns = gone.any(2), gone.any(1)
    assert torch.equal(gone, rows[:, :, None] & columns[:, None])
    assert rows.sum(1).max() <= 11 and columns.sum(1).max() <= 5 and gone.any((1, 2)).float().mean() > 0.5
    assert all(len(row.nonzero()) == 0 or row.nonzero().diff(dim=0).eq(1).all() for row in rows)
    assert rows.float().mean(0).min() > 0 and columns.float().mean(0).min() > 0  # everywhere, in the end


def test_a_model_without_a_teacher_can_be_trained_on_erased_inputs(speech):
    frames, mask = speech
    task, batch = Task(), {"inputs": frames[None], "mask": mask[None], "targets": torch.tensor([[1, 3]])}
    losses = []
    for erase in (False, True):
        recipe = SvClassToken(tokens=1, distil=False, erase=erase)
        torch.manual_seed(0)
        learner = recipe.learner(task, recipe.build(task, 8), 8).double().eval()
        losses.append((recipe.loss(task, learner, batch).item(), task.loss(learner, batch).item()))
    assert losses[0][0] == losses[0][1] == losses[1][1] != losses[1][0]


def test_attention_of_the_token_is_shown(speech):
    frames, mask = speech
    batch = {"inputs": frames[None], "mask": mask[None]}
    model = built()
    (picture,) = SvClassToken().pictures(model, batch)
    assert picture.rows == ["head 0", "head 1"] and len(picture.columns) == 10
    assert all(0.3 < sum(row) <= 1 for row in picture.values)  # the rest is on the tokens themselves
    shown = model.encoder.blocks[-1].shown[0, :, 0]
    assert [sum(row) for row in picture.values] == pytest.approx((1 - shown[:, :2].sum(1)).tolist(), rel=1e-6)
    assert SvClassToken(pooling="mean", distil=False).pictures(built(pooling="mean", distil=False), batch) == ()


def test_bfloat16_runs(speech):
    model, frames = built().float(), speech[0].float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(frames, speech[1])
    assert out.isfinite().all() and error(out, model(frames, speech[1])) < 0.1


@pytest.mark.parametrize("spec", ["sv_class_token:pooling=mean", "sv_class_token:erase=true", "sv_class_token:tokens=0",
                                  "sv_class_token:pooling=max", "sv_class_token:temperature=0"])  # fmt: skip
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="sv_class_token"):
        parse(spec)
    assert parse("sv_class_token:pooling=mean,distil=false").pooling == "mean"
