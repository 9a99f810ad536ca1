# SPDX-License-Identifier: Apache-2.0
"""MAELRE: forms of attention against their formulas, merging between stages, and where it is exact attention."""

import pytest
import torch

from manyheads.attention.reference import attention
from manyheads.call import MixerConfig
from manyheads.errors import UserError
from manyheads.mixers.maelre import Maelre, channel_attention
from manyheads.models.classifier import Classifier, ClassifierConfig
from manyheads.models.decoder import DecoderConfig
from manyheads.models.encoder import Encoder
from manyheads.spec import parse
from tolerance import FORMULA, SAME, assert_close, error, is_far

FORMS = ("efficient", "xca", "elu")


def draw(length=22, heads=2, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, 8, generator=generator, dtype=torch.float64) for _ in range(3)]


def literal(q, k, v, form, tau=1.0, sizes=None):
    """By the matrix of tokens, or of channels, of one head as the formula has it."""
    out = torch.zeros_like(v)
    s = torch.ones(q.shape[0], q.shape[2], dtype=q.dtype) if sizes is None else sizes
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])).tolist():
        Q, K, V, S = q[b, h], k[b, h], v[b, h], s[b][:, None]
        if form == "efficient":
            rho_q = Q.exp() / Q.exp().sum(1, keepdim=True)
            rho_k = S * K.exp() / (S * K.exp()).sum(0, keepdim=True)
            out[b, h] = (rho_q @ rho_k.T) @ V
        elif form == "xca":
            unit_q, unit_k = (x / (S * x**2).sum(0, keepdim=True).sqrt() for x in (Q, K))
            scores = (unit_q.T @ (S * unit_k) / tau).exp()
            out[b, h] = V @ (scores / scores.sum(1, keepdim=True)).T
        else:
            phi_q, phi_k = (torch.where(x > 0, x + 1, x.exp()) for x in (Q, K))
            weights = phi_q @ (S * phi_k).T
            out[b, h] = weights / weights.sum(1, keepdim=True) @ V
    return out


@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms_are_their_formulas(form, sized):
    q, k, v = draw()
    sizes = torch.randint(1, 5, (2, 22), generator=torch.Generator().manual_seed(3)).double() if sized else None
    got = channel_attention(q, k, v, form, tau=0.7, log_sizes=None if sizes is None else sizes.log())
    assert_close(got, literal(q, k, v, form, 0.7, sizes), 4 * FORMULA)
    if sized:
        assert error(channel_attention(q, k, v, form, tau=0.7), got) > 1e-3  # control: sizes left out
    wrong = {"efficient": "elu", "xca": "efficient", "elu": "efficient"}[form]
    assert error(literal(q, k, v, wrong, 0.7, sizes), got) > 1e-2  # control: another form


def test_weights_of_efficient_attention():
    q, k, _ = draw()
    constant = torch.full((2, 2, 22, 8), 3.0, dtype=torch.float64)
    for form in ("efficient", "elu"):
        assert_close(channel_attention(q, k, constant, form), constant, FORMULA)
    assert error(channel_attention(q.exp(), k, constant, "xca"), constant) < FORMULA  # mixes channels, and so constants
    weights = channel_attention(q, k, torch.eye(22, dtype=torch.float64).expand(2, 2, 22, 22), "efficient")
    assert weights.min() >= 0
    assert_close(weights.sum(3), 1.0, FORMULA)
    assert error(weights, attention(q, k, torch.eye(22, dtype=q.dtype).expand(2, 2, 22, 22), scale=1).mT) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_padding_of_channel_attention(form):
    q, k, v = draw()
    mask = torch.arange(22) < torch.tensor([[22], [9]])
    alone = channel_attention(*(x[1:, :, :9] for x in (q, k, v)), form)
    assert_close(channel_attention(q, k, v, form, mask=mask)[1:, :, :9], alone, 4 * FORMULA)
    assert error(channel_attention(q, k, v, form)[1:, :, :9], alone) > 1e-3  # control


def layer(spec, index=0, dim=16):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return parse(spec).build(MixerConfig(dim, 2, 2, dim // 2, index, 3, 64, causal=False)).double()


@pytest.mark.parametrize("form", [*FORMS, "softmax"])
def test_a_token_of_size_two_is_two_tokens(form):
    """Exactly, whichever way attention is computed: many tokens and few."""
    for length, switch in ((20, 16), (20, 99)):
        module = layer(f"maelre:form={form},switch={switch}")
        x = torch.randn(2, length, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        twice = torch.cat([x[:, :1], x], 1)
        sizes = torch.ones(2, length, dtype=torch.float64)
        sizes[:, 0] = 2
        want = module(twice)[0][:, 1:]
        assert_close(module(x, sizes=sizes)[0], want, 4 * FORMULA)
        assert error(module(x)[0], want) > 1e-5  # control


@pytest.mark.parametrize("form", FORMS)
def test_few_tokens_meet_exact_attention(form):
    module, plain = layer(f"maelre:form={form}"), layer("softmax:position=none")
    plain.load_state_dict({name: x for name, x in module.state_dict().items() if "tau" not in name})
    x = torch.randn(2, 17, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert_close(module(x[:, :16])[0], plain(x[:, :16])[0], FORMULA)  # N <= D
    assert error(module(x)[0], plain(x)[0]) > 1e-2  # control: one token more
    exact = layer("maelre:form=softmax")
    exact.load_state_dict(plain.state_dict())
    assert_close(exact(x)[0], plain(x)[0], FORMULA)


def model(spec, layers=4, dim=8, length=64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(spec, DecoderConfig(29, dim, layers, 2, hidden=16, length=length)).eval()


@pytest.mark.parametrize("merge", ["pairs", "matching", "stride", "random"])
@pytest.mark.parametrize("ratio", [2, 4])
def test_tokens_halve_until_they_are_few(merge, ratio):
    encoder = model(f"maelre:merge={merge},ratio={ratio}")
    seen = []
    for block in encoder.blocks:
        block.mixer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    x = torch.randn(2, 50, 8)
    y, sizes, grouping = encoder.merged(x, None)
    want = {2: [50, 25, 13, 7], 4: [50, 13, 4, 4]}[ratio]
    assert seen == want and y.shape[1] == want[-1] == grouping.count
    assert sizes.sum(1).tolist() == [50, 50] and (sizes >= 1).all()
    assert torch.equal(grouping.totals(torch.ones(2, 50)), sizes)
    lengths = torch.tensor([50, 21])
    _, sizes, grouping = encoder.merged(x, lengths)
    assert sizes.sum(1).tolist() == [50, 21]
    assert (sizes > 0).sum(1).tolist() == [want[-1], {2: 6, 4: 6}[ratio]]  # as it is alone
    assert (grouping.into[1, 21:] == grouping.count).all()  # padding has joined none
    two = model(f"maelre:merge={merge},blocks=2")
    assert two.merged(x, None)[0].shape[1] == 25 and model("maelre:merge=none").merged(x, None)[0].shape[1] == 50


def test_equal_pairs_lose_nothing():
    """Every token twice in a row, without positions: what it is alone, at half the number of layers ahead."""
    ids = torch.randint(29, (2, 12), generator=torch.Generator().manual_seed(0))
    twice = ids.repeat_interleave(2, 1)
    for merge in ("pairs", "matching"):
        merging, whole = model(f"maelre:merge={merge},switch=12", 2), model("maelre:merge=none,switch=12", 2)
        whole.load_state_dict(merging.state_dict(), strict=False)
        # the second layer has 12 tokens of size two, and attends to them exactly
        assert merging.merged(merging.embed(twice), None)[0].shape[1] == 12
        assert_close(merging(twice)[0][:, ::2], merging(twice)[0][:, 1::2], SAME)
        exact, first = model("maelre:merge=none,form=softmax", 1), model("maelre:merge=none,switch=12", 1)
        for other in (exact, first):
            other.load_state_dict(whole.state_dict(), strict=False)
        hidden = first.blocks[0](first.embed(twice), None)[0]
        want = merging.blocks[1](hidden[:, ::2], None)[0]
        assert_close(merging.merged(merging.embed(twice), None)[0], want, SAME)
    chance = model("maelre:merge=random,switch=12", 2)  # control: strangers merge
    chance.load_state_dict(merging.state_dict(), strict=False)
    assert is_far(chance(twice)[0], merging(twice)[0], SAME)


def test_gradients_are_finite_where_all_tokens_tie():
    for spec in ("maelre:merge=matching", "maelre", "maelre:form=xca,switch=4", "maelre:form=elu"):
        encoder = model(spec).train()
        encoder(torch.zeros(2, 40, dtype=torch.long))[0].square().mean().backward()
        for name, p in encoder.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all(), name


def test_a_classifier_merges_and_pools_by_size():
    config = ClassifierConfig(256, 8, 3, 2, length=40, classes=3)
    classifier = Classifier("maelre:merge=matching", config).eval()
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = classifier(ids)[0]
    x, sizes, _ = classifier.merged(classifier.embed(ids), None)
    assert x.shape[1] == 10 and sizes.amax() > 4  # unequal
    x = classifier.norm(x)
    assert_close(logits, classifier.head((x * sizes[..., None]).sum(1) / 40), SAME)
    assert is_far(classifier.head(x.mean(1)), logits, SAME)  # control
    mask = torch.arange(40) < torch.tensor([[40], [13]])
    assert_close(classifier(ids, mask=mask)[0][1:], classifier(ids[1:, :13])[0], SAME)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_errs_by_its_roundings(form):
    encoder = model(f"maelre:form={form},switch=4", layers=3, dim=32)
    ids = torch.randint(29, (2, 48), generator=torch.Generator().manual_seed(0))
    want = encoder(ids)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(ids)[0]
    assert 1e-4 < error(got, want) < 0.02


def test_what_is_refused():
    for wrong, says in (
        ("maelre:ratio=1", "two or more"), ("maelre:merge=matching,ratio=3", "power of two"),
        ("maelre:switch=-1", "two or more"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            parse(wrong)
    with pytest.raises(UserError, match="encoder attention"):
        Maelre().build(MixerConfig(16, 2, 2, 8, 0, 1, 64))
