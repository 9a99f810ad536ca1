# SPDX-License-Identifier: Apache-2.0
"""What every token mixer must have that sees both sides: functions of a mixer, or an Encoder, that raise if it has not.

As :mod:`oracles.mixers` has them for those that see the past only.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from manyheads.call import MixerConfig
from manyheads.errors import UserError
from manyheads.models.decoder import DecoderConfig
from manyheads.models.encoder import Encoder
from manyheads.spec import parse
from oracles.mixers import DIM, HEADS, VOCAB, mixing, scattered
from tolerance import FORMULA, assert_close, error

VARIANTS = {
    "softmax": ["softmax:window=5", "softmax:position=t5", "softmax:position=none"],
    "longt5_tglobal": [
        "longt5_tglobal:radius=6,block=4", "longt5_tglobal:radius=0,block=3", "longt5_tglobal:radius=6,block=0",
    ],
    "maelre": [
        "maelre:switch=4,merge=matching", "maelre:switch=4,form=xca,ratio=3", "maelre:switch=9,form=elu,merge=stride",
        "maelre:switch=1,merge=random,ratio=4", "maelre:form=softmax,switch=8",
    ],
    "tkl_local": ["tkl_local:chunk=6,overlap=2", "tkl_local:chunk=5,overlap=1", "tkl_local:chunk=0"],
    "longvq": ["longvq:block=4,codes=5,key_dim=8", "longvq:block=0,codes=7,key_dim=8"],
    "skim_attention": [
        "skim_attention:window=7,context=1,resolution=70", "skim_attention:shared=false",
        "skim_attention:axes=order,resolution=80",
        "skim_attention.embeddings:resolution=70,position=none",
    ],
    "mra": ["mra:block=4,per_row=2", "mra:block=4,per_row=4,sparse=true,band=3", "mra:block=5,per_row=0"],
}  # fmt: skip
SPECS = [spec for slug in mixing("bidirectional") for spec in (slug, *VARIANTS.get(slug, ()))]
ROWS = (9, 23, 1, 66)  # tokens of the rows of a batch


def mixer(spec: str, layer: int = 0, kv_heads: int = HEADS) -> nn.Module:
    """A mixer in float64 with weights that leave nothing symmetric."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = MixerConfig(DIM, HEADS, kv_heads, DIM // HEADS, layer, 2, 64, causal=False)
        return scattered(parse(spec).build(config))


def encoder(spec: str) -> Encoder:
    """A whole model likewise."""
    return scattered(Encoder(spec, DecoderConfig(VOCAB, DIM, 2, HEADS, hidden=24, length=64)))


def drawn(module: nn.Module, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    if isinstance(module, Encoder):
        return torch.randint(VOCAB, shape, generator=generator)
    return torch.randn(*shape, DIM, generator=generator, dtype=torch.float64)


def sees_both_sides(module: nn.Module, limit: float = FORMULA) -> None:
    """The next token and the last one matter to a token between them."""
    x = drawn(module, 1, 40)
    want = module(x)[0]
    for t in (19, 21):
        other = x.clone()
        other[:, t] = (other[:, t] + 1) % VOCAB if x.ndim == 2 else 1 - other[:, t]
        alone = module(x[:, 20:21])[0]
        got = module(other)[0]
        if error(alone, want[:, 20:21]) > limit:  # a mixer may see nothing else
            assert error(got[:, 20], want[:, 20]) > 1e-6, f"token {t} is not seen from token 20"


def padding_changes_nothing(module: nn.Module, limit: float = FORMULA) -> None:
    """Rows padded left, right and in the middle, with NaN, give what they give alone."""
    rows = [drawn(module, 1, n)[0] for n in ROWS]
    width = max(ROWS) + 2
    places = {
        "left": [range(width - n, width) for n in ROWS], "right": [range(n) for n in ROWS],
        "middle": [(*range(n // 2), *range(width - n + n // 2, width)) for n in ROWS],
    }  # fmt: skip
    for side, columns in places.items():
        mask = torch.zeros(len(ROWS), width, dtype=torch.bool)
        x = torch.full((len(ROWS), width, *rows[0].shape[1:]), 1 if rows[0].ndim == 1 else float("nan"))
        x = x.to(rows[0].dtype)
        for i, at in enumerate(columns):
            mask[i, list(at)] = True
            x[i, list(at)] = rows[i]
        y, _ = module(x, mask=mask)
        for i, row in enumerate(rows):
            try:
                assert_close(y[i][mask[i]], module(row[None])[0][0], limit)
            except AssertionError as wrong:
                raise AssertionError(f"padded {side}, row {i}: {wrong}") from None


def packed_equals_apart(module: nn.Module, limit: float = FORMULA) -> None:
    """Sequences in one row know nothing of each other."""
    lengths = (5, 0, 1, 70)
    rows = [drawn(module, 1, n) for n in lengths]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    y, _ = module(torch.cat(rows, 1), cu_seqlens=bounds)
    for row, (a, b) in zip(rows, pairwise(bounds.tolist()), strict=True):
        if a < b:
            assert_close(y[:, a:b], module(row)[0], limit)


def batch_equals_singles(module: nn.Module, limit: float = FORMULA) -> None:
    """Rows do not know their neighbours."""
    x = drawn(module, 3, 37)
    y, _ = module(x)
    for i in range(3):
        assert_close(y[i : i + 1], module(x[i : i + 1])[0], limit)


def has_no_state(module: nn.Module, limit: float = FORMULA) -> None:
    """It gives no state, and refuses one."""
    x = drawn(module, 1, 5)
    state = module(x)[1]
    assert all(part is None for part in state) if isinstance(state, list) else state is None
    with pytest.raises(UserError, match="no state"):
        module(x, state=[object()] * 2 if isinstance(module, Encoder) else object())


def gradients_are_right(spec: str, **given: Any) -> None:
    """Finite differences in float64, with padding."""
    module = mixer(spec, **given).requires_grad_(True)
    x = drawn(module, 2, 11).requires_grad_(True)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, 0] = mask[1, 7:] = False
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        weights = dict(zip(names, values, strict=True))
        y, _ = torch.func.functional_call(module, weights, x, {"mask": mask})
        return torch.cat([y[mask], torch.func.functional_call(module, weights, x)[0].flatten(0, 1)])

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


ORACLES: tuple[Callable[..., None], ...] = (
    sees_both_sides, padding_changes_nothing, packed_equals_apart, batch_equals_singles, has_no_state,
)  # fmt: skip


class Wrong(nn.Module):
    """A mixer made wrong in one way."""

    def __init__(self, inner: nn.Module, how: str) -> None:
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x: Tensor, *, mask: Any = None, state: Any = None, cu_seqlens: Any = None) -> tuple[Tensor, Any]:
        if self.how == "keeps a state":
            return self.inner(x, mask=mask, cu_seqlens=cu_seqlens)[0], x
        if self.how == "one document":
            return self.inner(x, mask=mask)
        if self.how == "reads padding":
            return self.inner(x.nan_to_num())
        y, _ = self.inner(x, mask=mask, state=state, cu_seqlens=cu_seqlens)
        return y + 1e-6 * y.mean(0, keepdim=True) if self.how == "leaks rows" else y, None


class Blind(nn.Module):
    """A mixer that sees the past only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
        return torch.cat([self.inner(x[:, : t + 1])[0][:, t:] for t in range(x.shape[1])], 1), None


WRONG = {
    "keeps a state": has_no_state, "one document": packed_equals_apart, "reads padding": padding_changes_nothing,
    "leaks rows": batch_equals_singles,
}  # fmt: skip
