# SPDX-License-Identifier: Apache-2.0
"""LongVQ's layer against its formula, its training, and its parts by themselves."""

import pytest
import torch
from torch import nn

from manyheads import UserError, parse
from manyheads.models.classifier import Classifier, ClassifierConfig
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.models.encoder import Encoder
from manyheads.tasks.training.sequence_classification import SequenceClassification
from manyheads.training import masked_token_loss, next_token_loss
from manyheads.training.matching import parameters_of
from oracles import encoders, mixers
from tolerance import FORMULA, SAME, assert_close, error, is_far, nearly

SPEC = "longvq:block=4,codes=5,key_dim=8,ndim=3"
CONFIG = DecoderConfig(29, dim=32, layers=2, heads=4, length=64)
IDS = torch.randint(29, (3, 41), generator=torch.Generator().manual_seed(7))


def norm(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() / x.shape[-1] ** 0.25


def averaged(x, m, way):
    a, d, b, e = (getattr(m, n).view(m.shape)[way] for n in ("alpha", "delta", "beta", "eta"))
    a, d, h, outs = a.sigmoid(), d.sigmoid(), 0.0, []
    for t in range(x.shape[1]):
        h = a * b * x[:, t, :, None] + (1 - a * d) * h
        outs.append((e * h).sum(-1))
    return torch.stack(outs, 1)


def formula(m, x, causal, far=True, gate=True):
    """The layer token by token, over all keys: ``[B, T, dim]``; the decoder adds X to it."""
    silu, sigmoid, at = nn.functional.silu, torch.sigmoid, torch.arange(x.shape[1])
    memory = averaged(x, m.memory, 0)
    if not causal:
        memory = memory + averaged(x.flip(1), m.memory, 1).flip(1)
    c = silu(memory + m.memory.direct * x)
    z, v = silu(m.z_proj(c)), silu(m.v_proj(x))
    q, k = norm(z * m.q_scale + m.q_shift), norm(z * m.k_scale + m.k_shift)
    table = (m.codebook.sums / m.codebook.counts[..., None].clamp(min=0.01))[0]
    k = table[(k[:, :, None] - table).square().sum(-1).argmin(-1)]
    apart, size = at[:, None] - at, m.strategy.block
    near = (at[:, None] // size - at // size).abs() <= 1
    bias = torch.where(near, m.bias[(apart if causal else apart + 2 * size - 1).clamp(0, len(m.bias) - 1)], 0.0)
    seen = (apart >= 0) | (not causal)
    o = (q @ k.mT + bias).masked_fill(~(seen & (near | far)), -torch.inf).softmax(-1) @ v
    r = silu(m.r_proj(c)) if gate else 1.0
    h = silu(m.h_proj(c) + m.o_proj(r * o))
    return sigmoid(m.u_proj(c)) * (h - x)


@pytest.mark.parametrize("causal", [True, False])
def test_is_its_formula(causal):
    m = (mixers if causal else encoders).mixer(SPEC)
    x = torch.randn(2, 37, mixers.DIM, dtype=torch.float64)
    y = m(x)[0]
    assert_close(y, formula(m, x, causal), 2 * FORMULA)
    assert is_far(y, formula(m, x, causal, far=False), 2 * FORMULA)  # controls
    assert is_far(y, formula(m, x, causal, gate=False), 2 * FORMULA)
    m.codebook.sums.mul_(1.2)
    assert is_far(y, m(x)[0], 2 * FORMULA)


def test_the_block_is_megas_post_norm():
    model = mixers.decoder(SPEC)
    block, x = model.blocks[0], torch.randn(1, 9, mixers.DIM, dtype=torch.float64)
    normed = block.mixer_norm(x)
    mixed = block.mixer(normed)[0]
    want = block.ffn_norm(normed + mixed)
    assert_close(block(x, None)[0], want + block.ffn(want), FORMULA)
    c, _ = block.mixer.memory(normed, None, None)
    u = block.mixer.u_proj(c).sigmoid()
    h = normed + mixed / u  # y = u h + (1 - u) x
    assert_close(normed + mixed, u * h + (1 - u) * normed, FORMULA)


@pytest.mark.parametrize("spec", ["longvq:block=4,codes=0,key_dim=8,ndim=2", "longvq:block=0,codes=0"])
def test_gradients(spec):
    mixers.gradients_are_right(spec)


def test_the_parts_by_themselves():
    x = torch.randn(1, 60, mixers.DIM, dtype=torch.float64)
    other = x.clone()
    other[:, 5] *= -1

    def reach(spec):
        m = mixers.mixer(spec)
        moved = (m(other)[0] - m(x)[0]).abs().amax(-1)[0] > 0
        return int(moved.nonzero().max())

    assert reach("longvq:block=4,codes=0,key_dim=8,ndim=0") == 11  # to the end of the next block
    assert reach("longvq:block=4,codes=5,key_dim=8,ndim=0,cached=false") == 11
    assert reach("longvq:block=64,codes=0,key_dim=8,ndim=0") == 59  # full attention
    assert reach("longvq:block=4,codes=5,key_dim=8,ndim=0") == 59
    assert reach("longvq:block=0,codes=0") == 59  # memory alone
    assert reach("longvq:block=0,codes=0,ndim=0") == 5
    names = {name.split("_")[0] for name, _ in mixers.mixer("longvq:block=0,codes=0").named_parameters()}
    assert not names & {"z", "v", "r", "o", "q", "k", "bias"}


def test_straight_through_in_training_alone():
    """Gradients pass to keys as if they were the codewords nearest to them."""
    m = mixers.mixer(SPEC).requires_grad_(True)
    k = torch.randn(2, 1, 20, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 1, 20, 8, dtype=torch.float64)
    nearest, codes, table, loss = m.codebook(k, None)
    assert loss is None and not nearest.requires_grad
    before = m.codebook.sums.clone()
    m.train()
    through, codes, table, loss = m.codebook(k, None)
    assert_close(through, nearest, FORMULA)
    grad = torch.autograd.grad((through.sin() * weight).sum(), k, retain_graph=True)[0]
    assert_close(grad, through.detach().cos() * weight, FORMULA)
    assert is_far(grad, k.detach().cos() * weight, FORMULA)  # control: as if there were no codebook
    assert_close(loss, 1e-4 * (k - table[0][codes[:, 0]][:, None]).square().sum(-1).mean(), FORMULA)
    assert_close(torch.autograd.grad(loss, k)[0], 2e-4 * (k - nearest).detach() / 40, FORMULA)
    assert is_far(m.codebook.sums, before, FORMULA)  # it followed the keys: all codewords were nobody's, and are keys
    assert m.codebook.counts.eq(1).all()
    assert all((k.detach()[:, 0] == word).all(-1).any() for word in m.codebook.sums[0])
    assert len(m.codebook.sums[0].unique(dim=0)) == 5  # each another
    moved = m.codebook.sums.clone()
    m.eval()(torch.randn(1, 9, mixers.DIM, dtype=torch.float64))
    assert torch.equal(m.codebook.sums, moved)


def test_commitment_reaches_every_training_loss():
    """Of decoders, encoders and classifiers; and of a packed or padded batch only tokens commit."""
    labels = IDS.masked_fill(torch.rand(IDS.shape) < 0.7, -100)
    task = SequenceClassification(data="tones", length=64, stride=4)
    sounds = torch.randn(4, 64, 1), torch.tensor([0, 1, 0, 1])
    config = ClassifierConfig(0, 32, 2, 4, length=16, stem="patches", stride=4)
    cases = [
        (Decoder, CONFIG, next_token_loss, IDS), (Encoder, CONFIG, masked_token_loss, (IDS, labels)),
        (Classifier, config, task.loss, sounds),
    ]  # fmt: skip
    for kind, size, loss, batch in cases:
        found = {}
        for weight in (0.0, 0.5):
            torch.manual_seed(0)
            model = kind(f"{SPEC},commitment={weight}", size).train()
            found[weight] = float(loss(model, batch).detach())
            committed = float(model.auxiliary_loss().detach())
            torch.manual_seed(0)
            evaluated = float(loss(kind(f"{SPEC},commitment={weight}", size).eval(), batch).detach())
            assert evaluated == nearly(found[0.0], torch.float32, 256)
        assert found[0.5] - found[0.0] == pytest.approx(committed, rel=1e-4) and committed > 0.01


def test_padding_neither_commits_nor_moves_a_codeword():
    m = mixers.mixer(SPEC).train()
    x, mask = torch.randn(2, 12, mixers.DIM, dtype=torch.float64), torch.rand(2, 12) < 0.7
    held = {name: y.clone() for name, y in m.codebook.state_dict().items()}
    losses, tables = [], []
    for fill in (0.0, 9.0, None):  # None, a control: what was padding counts
        m.codebook.load_state_dict(held)
        m(x if fill is None else x.masked_fill(~mask[..., None], fill), mask=None if fill is None else mask)
        losses.append(float(m.auxiliary.detach()))
        tables.append(m.codebook.sums.clone())
    assert losses[0] == nearly(losses[1]) and losses[0] != nearly(losses[2])
    assert_close(tables[1], tables[0], FORMULA)
    assert is_far(tables[2], tables[0], FORMULA)


def test_codewords_count_as_what_is_learned():
    sizes = [parameters_of(Decoder(f"longvq:codes={s},key_dim=8,block=4", CONFIG)) for s in (16, 64)]
    assert sizes[1] - sizes[0] == CONFIG.layers * 48 * (8 + 1)
    made = [Decoder.matched(f"longvq:codes={s},key_dim=8,block=4", CONFIG, 40_000) for s in (16, 64)]
    assert made[0].config.hidden > made[1].config.hidden


def test_it_learns_and_its_codebook_is_used():
    """A pattern of period 12 with a window of 8: trained by the loop that all are trained by."""
    from manyheads.training import train_lm

    ids = (torch.arange(49) % 12).expand(4, -1) + torch.arange(4)[:, None]
    torch.manual_seed(0)
    model = Decoder(SPEC, CONFIG)
    before = model.blocks[0].mixer.codebook.sums.clone()
    state = train_lm(model, lambda step: ids, 30, lr=1e-2)
    assert state.losses[-1] < 0.5 * state.losses[0]
    book = model.blocks[0].mixer.codebook
    assert is_far(book.sums, before, SAME) and book.sums.isfinite().all()
    out, whole = model.generate(ids[:, :24], 6), model(ids[:, :30])[0]
    assert out.shape == (4, 6) and whole.isfinite().all()


def test_half_precision_and_the_memory_begins_at_many_spans():
    m = mixers.mixer("longvq:block=4,codes=5,key_dim=8").float()
    x = torch.randn(1, 30, mixers.DIM)
    assert error(m.bfloat16()(x.bfloat16())[0], m.float()(x)[0]) < 0.2  # a key near two codewords takes either
    memory = parse("longvq").build(mixers.MixerConfig(8, 1, 1, 8, 0, 1, 256)).memory
    kept = 1 - memory.alpha.view(8, 16).sigmoid() * memory.delta.view(8, 16).sigmoid()
    assert_close(kept[0, [0, -1]], torch.tensor([1 - 1 / 4, 1 - 1 / 256]), SAME)


def test_errors():
    for wrong in ("codes=-1", "gamma=1.1", "key_dim=0", "block=0,cached=false"):
        with pytest.raises(UserError, match="longvq"):
            parse(f"longvq:{wrong}")
    with pytest.raises(UserError, match="near in blocks"):
        mixers.mixer("longvq:block=0")
    with pytest.raises(UserError, match="no state"):
        encoders.mixer(SPEC)(torch.randn(1, 3, mixers.DIM, dtype=torch.float64), state=object())
