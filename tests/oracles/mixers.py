# SPDX-License-Identifier: Apache-2.0
"""What every token mixer must have: functions of a mixer, or a Decoder, that raise AssertionError if it has not.

``check(spec)`` asks a mixer for all of them; ``tests/oracles/test_mixers.py`` does so for every strategy
that is a ``Mixer``, and for whole models.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from manyheads import catalog
from manyheads.call import MixerConfig
from manyheads.errors import UserError
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.spec import parse
from manyheads.strategy import Mixer
from tolerance import PROJECTED, assert_close

HEADS, DIM, VOCAB = 4, 32, 29
LONG = 150  # tokens: two chunks of 64 and a part of one
CUTS = (0, 1, 66, 67, 143, LONG)
ROWS = (9, 4, 7)  # tokens of the rows of a batch

# Further forms of a strategy that are worth the same proof.
VARIANTS = {
    "softmax": ["softmax:window=5", "softmax:position=alibi", "softmax:position=t5", "softmax:position=none"],
    "tnl_lightning": ["tnl_lightning:decay=alibi", "tnl_lightning:decay=none,lrpe=false,gate=false"],
    "minimax_hybrid": ["minimax_hybrid:every=2", "minimax_hybrid:window=5", "minimax_hybrid:every=1,rotary=0"],
    "blalm_mlstm": ["blalm_mlstm:conv=4,hedgehog=true,window=5", "blalm_mlstm:window=8,mix_by=scalar"],
    "graph_gin_attention": [
        "graph_gin_attention:aggregate=pna",
        "graph_gin_attention:adjacency=relu,threshold=0.05,o_proj=true",
    ],
    "dijiang": [
        "dijiang:features=dct,decay=true,norm=group",
        "dijiang:features=favor,decay=true",
        "dijiang:features=elu",
    ],
    "longvq": ["longvq:block=4,codes=5,key_dim=8", "longvq:block=8,codes=0,key_dim=8"],
}
CONSTANT = ("tnl_lightning", "minimax_hybrid", "minimax_hybrid:window=5", "blalm_mlstm", *VARIANTS["tnl_lightning"],
            *VARIANTS["blalm_mlstm"], "softmax:window=5", "longvq", *VARIANTS["longvq"], "dijiang",
            *VARIANTS["dijiang"])  # fmt: skip


def mixing(direction: str = "causal") -> list[str]:
    """Slugs of all strategies that can be the mixer of a Decoder, or of an Encoder."""
    slugs = [p.slug for p in [*catalog.papers(), *catalog.baselines()] if p.state != "planned"]
    found = [(slug, catalog.load(slug)) for slug in slugs]
    return [slug for slug, made in found if issubclass(made, Mixer) and direction in made.directions]


SPECS = [spec for slug in mixing() for spec in (slug, *VARIANTS.get(slug, ()))]


def mixer(spec: str, layer: int = 0, layers: int = 2, kv_heads: int = HEADS) -> nn.Module:
    """A mixer in float64 with weights that leave no gate closed and nothing symmetric."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scattered(parse(spec).build(MixerConfig(DIM, HEADS, kv_heads, DIM // HEADS, layer, layers, 64)))


def decoder(spec: str, layers: int = 2) -> Decoder:
    """A whole model likewise."""
    return scattered(Decoder(spec, DecoderConfig(VOCAB, DIM, layers, HEADS, hidden=24, length=64)))


def scattered(module: Any) -> Any:
    """``module`` in float64, without gradients, every weight moved by chance."""
    module = module.double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        if p.ndim > 1 or p.shape[-1:].numel() > 1:
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.3 if p.ndim > 1 else 0.1))
    return module


def _drawn(module: nn.Module, *shape: int) -> Tensor:
    """What the module reads: tokens of a Decoder, channels of a mixer."""
    generator = torch.Generator().manual_seed(sum(shape))
    if isinstance(module, Decoder):
        return torch.randint(VOCAB, shape, generator=generator)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


def _spoiled(module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """``x`` with what no module may read where ``mask`` is False."""
    fill = 1 if isinstance(module, Decoder) else float("nan")
    return torch.where(mask if x.ndim == 2 else mask[..., None], x, torch.full_like(x, fill))


def reorder(state: Any, rows: Tensor) -> Any:
    return [part.reorder(rows) for part in state] if isinstance(state, list) else state.reorder(rows)


def nbytes(state: Any) -> int:
    return sum(part.nbytes for part in state) if isinstance(state, list) else int(state.nbytes)


def split_equals_one_pass(module: nn.Module, limit: float = PROJECTED) -> None:
    """The state carries everything: pieces of any size give what one pass gives."""
    x = _drawn(module, 2, LONG)
    want, state, parts = module(x)[0], None, []
    for a, b in pairwise(CUTS):
        y, state = module(x[:, a:b], state=state)
        parts.append(y)
    assert_close(torch.cat(parts, 1), want, limit)


def decoding_equals_one_pass(module: nn.Module, limit: float = PROJECTED) -> None:
    """Token by token; a sequence of one token; a state kept aside is not changed by what goes on from it."""
    x = _drawn(module, 2, 11)
    want, state, parts = module(x)[0], None, []
    for t in range(11):
        y, state = module(x[:, t : t + 1], state=state)
        parts.append(y)
        if t == 6:
            aside = state
    assert_close(torch.cat(parts, 1), want, limit)
    assert_close(module(x[:, 7:], state=aside)[0], want[:, 7:], limit)


def is_causal(module: nn.Module, limit: float = PROJECTED) -> None:
    """What comes later changes nothing before it."""
    x = _drawn(module, 1, LONG)
    want = module(x)[0]
    for t in (1, 64, 100):
        other = x.clone()
        other[:, t:] = (other[:, t:] + 1) % VOCAB if x.ndim == 2 else -other[:, t:]
        assert_close(module(other)[0][:, :t], want[:, :t], limit)


def padding_changes_nothing(module: nn.Module, limit: float = PROJECTED) -> None:
    """Rows padded left, right and in the middle, with NaN, give what they give alone, and so does what follows them."""
    rows = [_drawn(module, 1, n)[0] for n in ROWS]
    after = _drawn(module, len(ROWS), 3)
    width = max(ROWS) + 2
    places = {
        "left": [range(width - n, width) for n in ROWS],
        "right": [range(n) for n in ROWS],
        "middle": [(*range(n // 2), *range(width - n + n // 2, width)) for n in ROWS],
    }
    for side, columns in places.items():
        mask = torch.zeros(len(ROWS), width, dtype=torch.bool)
        x = rows[0].new_zeros(len(ROWS), width, *rows[0].shape[1:])
        for i, at in enumerate(columns):
            mask[i, list(at)] = True
            x[i, list(at)] = rows[i]
        y, state = module(_spoiled(module, x, mask), mask=mask)
        more, state = module(after[:, :1], state=state)
        rest, _ = module(after[:, 1:], state=state)
        for i, row in enumerate(rows):
            want, _ = module(torch.cat([row, after[i]])[None])
            got = torch.cat([y[i][mask[i]], more[i], rest[i]])[None]
            try:
                assert_close(got, want, limit)
            except AssertionError as wrong:
                raise AssertionError(f"padded {side}, row {i}: {wrong}") from None


def packed_equals_apart(module: nn.Module, limit: float = PROJECTED) -> None:
    """Sequences in one row know nothing of each other, and each can be gone on with from its state, apart or packed."""
    lengths = (5, 0, 1, 70)
    rows = [_drawn(module, 1, n) for n in lengths]
    after = _drawn(module, len(rows), 2)
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    y, state = module(torch.cat(rows, 1), cu_seqlens=bounds)
    more, _ = module(after, state=state)
    for i, (a, b) in enumerate(pairwise(bounds.tolist())):
        want, _ = module(torch.cat([rows[i], after[i : i + 1]], 1))
        assert_close(torch.cat([y[:, a:b], more[i : i + 1]], 1), want, limit)
    try:
        again, _ = module(after.flatten(0, 1)[None], state=state, cu_seqlens=torch.arange(0, 2 * len(rows) + 1, 2))
    except UserError:  # a mixer may refuse this
        return
    assert_close(again, more.flatten(0, 1)[None], limit)


def batch_equals_singles(module: nn.Module, limit: float = PROJECTED) -> None:
    """Rows do not know their neighbours, and states follow their rows."""
    x = _drawn(module, 3, 9)
    y, state = module(x[:, :8])
    order = torch.tensor([2, 0, 2])
    more, _ = module(x[order, 8:], state=reorder(state, order))
    for i in range(3):
        assert_close(y[i : i + 1], module(x[i : i + 1, :8])[0], limit)
    for i, row in enumerate(order.tolist()):
        assert_close(more[i : i + 1], module(x[row : row + 1])[0][:, 8:], limit)


def state_is_constant(module: nn.Module) -> None:
    """Bytes of the state do not depend on the length."""
    sizes = {nbytes(module(_drawn(module, 1, n))[1]) for n in (70, 71, LONG)}
    assert len(sizes) == 1, f"the state grows: {sorted(sizes)}"


def gradients_are_right(spec: str, **given: Any) -> None:
    """Finite differences in float64, through a state, with padding."""
    module = mixer(spec, **given)
    module.requires_grad_(True)
    x = _drawn(module, 2, 5).requires_grad_(True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 0] = False
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        def call(*a: Any, **k: Any) -> Any:
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), a, k)

        y, state = call(x[:, :3], mask=mask[:, :3])
        return torch.cat([y[mask[:, :3]], call(x[:, 3:], state=state)[0].flatten(0, 1)])

    # A gradient that is wrong is found at once; torch then spends half a minute on the table of its message.
    with mock.patch.object(sys.modules["torch.autograd.gradcheck"], "_run_slow_mode_and_get_error", lambda *_: ""):
        assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)
    grads = torch.autograd.grad(run(x, *module.parameters()).square().sum(), list(module.parameters()))
    assert all(g.isfinite().all() for g in grads)


ORACLES: tuple[Callable[..., None], ...] = (
    split_equals_one_pass, decoding_equals_one_pass, is_causal, padding_changes_nothing, packed_equals_apart,
    batch_equals_singles,
)  # fmt: skip


def check(spec: str, limit: float = PROJECTED, **given: Any) -> None:
    """All oracles on one mixer, its gradients too; ``given`` as for :func:`mixer`."""
    module = mixer(spec, **given)
    for oracle in ORACLES:
        oracle(module, limit)
    gradients_are_right(spec, **given)


class Wrong(nn.Module):
    """A mixer made wrong in one way."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor, *, mask: Any = None, state: Any = None, cu_seqlens: Any = None) -> tuple[Tensor, Any]:
        if self.how == "forgets":
            state = None
        if self.how == "reads padding":
            x, mask = x.nan_to_num(), None
        if self.how == "one document":
            _, state = self.inner(x, cu_seqlens=cu_seqlens) if cu_seqlens is not None else (x, state)
            return self.inner(x, mask=mask, state=None if cu_seqlens is not None else state)[0], state
        y, after = self.inner(x, mask=mask, state=state, cu_seqlens=cu_seqlens)
        if self.how == "leaks rows":
            y = y + 1e-6 * y.mean(0, keepdim=True)
        if self.how == "looks ahead":
            y = y + 1e-6 * x.nan_to_num().mean(1, keepdim=True)
        return y, after


WRONG = {
    "forgets": (split_equals_one_pass, decoding_equals_one_pass),
    "reads padding": (padding_changes_nothing,),
    "one document": (packed_equals_apart,),
    "leaks rows": (batch_equals_singles,),
    "looks ahead": (is_causal,),
}
