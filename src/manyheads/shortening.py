# SPDX-License-Identifier: Apache-2.0
"""Texts are shortened before a model reads them, by the attention that their tokens receive in some model.

    for made in manyheads.shorten(programs, "dietcode:budget=0.6", tokenizer, model=model):
        print(made.text)

Attention is measured once (:func:`learn`); what comes of it serves any number of texts, and models with other
tokenizers. The model may be any that reads text, whichever attention function it runs: nothing of it is changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .call import Site
from .calls.statistics import Statistic
from .errors import UserError
from .inspect import watch
from .lens import AttentionView, Lens, LensResult, Memory, PerToken, device_of
from .spec import parse
from .strategy import Strategy
from .text_reducing import Shortened, TextReducer, TextWeights

__all__ = ["Received", "attention_received", "learn", "shorten"]


@dataclass
class FromOthers:
    """Sums over queries of the weights on each key, its own query left out: ``[B, S]``, mean over heads.

    Attributes:
        valid: ``[B, T]``, queries that count.
    """

    valid: Tensor
    total: Tensor | None = None

    def update(self, rows: Tensor, start: int, length: int) -> None:
        weights, first = rows.mean(1), rows.shape[3] - length + start
        weights = weights * self.valid[:, start : start + rows.shape[2], None]
        weights.diagonal(first, 1, 2).zero_()
        self.total = weights.sum(1) if self.total is None else self.total + weights.sum(1)

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total


@dataclass(frozen=True, kw_only=True)
class Received(Lens):
    """Attention that each token receives from others, mean over heads: times what it would be if all were even.

    Of the last of the layers looked at. Evenly spread, a query's attention is one share for each key that it sees, in a
    causal model those before it and itself; windows narrower than that are not known here. The last token of a causal
    model, which no other sees, has NaN.
    """

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        return {"sum": FromOthers(view.valid.float())}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        count, length, causal = view.keys.float().cumsum(1), view.valid.shape[1], view.call.site.causal
        share = view.valid / (count[:, -length:] if causal else count[:, -1:]).clamp(min=1)
        after = share.flip(1).cumsum(1).flip(1) if causal else share.sum(1, keepdim=True)
        kept: PerToken = view.memory.setdefault("received", PerToken())
        kept.add((found["sum"] / (after - share)).masked_fill(~view.keys, torch.nan), view.fresh)

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        return LensResult(series={"received": sites[-1][1]["received"].rows()})


def attention_received(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], layers: tuple[int, ...] | None = None
) -> list[list[float]]:
    """What each token of each text receives in the last layer, or the last of ``layers``, see :class:`Received`.

    Tokens that the tokenizer puts around a text are read and not told of; a causal model whose tokenizer puts none
    reads the token that begins a text, since the first one of any text takes attention that it does not need. Of a text
    that is longer than the model reads, only the beginning has values.
    """
    config: Any = getattr(model, "config", None)
    most = int(getattr(config.get_text_config(), "max_position_embeddings", 0) or 2**30) if config else 2**30
    around = tokenizer("", add_special_tokens=True)["input_ids"]
    if not around and tokenizer.bos_token_id is not None:
        around = [tokenizer.bos_token_id]
    read = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: most - len(around)] for text in texts
    ]
    base: Any = getattr(model, "base_model", model)
    with watch(base, Received(layers=layers)) as seen, torch.no_grad():
        for ids in read:
            base(input_ids=torch.tensor([[*around[:1], *ids, *around[1:]]], device=device_of(model)))
    start = len(around[:1])
    rows = seen.compute().series["received"]
    return [row[start : start + len(ids)].tolist() for ids, row in zip(read, rows, strict=True)]


def learn(strategy: str | Strategy, model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> TextWeights:
    """What ``strategy`` learns of the attention of ``model`` on ``texts``: the weights that it shortens by.

    Raises:
        UserError: it shortens no texts or learns nothing, or a text cannot be read.
    """
    found = _reducer(strategy)
    if not texts:
        raise UserError(f"{found.slug} learns from texts, and none is given")
    read = [found.read(text, tokenizer) for text in texts]
    return found.learn(read, attention_received(model, tokenizer, [one.text for one in read], found.layers))


def shorten(
    texts: Sequence[str], strategy: str | Strategy, tokenizer: Any, *, model: nn.Module | None = None,
    weights: TextWeights | None = None,
) -> list[Shortened]:  # fmt: skip
    """Each text in no more tokens than the strategy's budget.

    Args:
        texts: to shorten.
        strategy: one that shortens texts, or its spec.
        tokenizer: a fast one, whose tokens are counted.
        model: from whose attention on these texts it learns, where ``weights`` are not given.
        weights: of :func:`learn`.

    Raises:
        UserError: it shortens no texts, learns and is given neither model nor weights, or a text cannot be read.
    """
    found = _reducer(strategy)
    if found.learns and weights is None and model is not None:
        weights = learn(found, model, tokenizer, texts)
    return [found.shorten(text, tokenizer, weights) for text in texts]


def _reducer(strategy: str | Strategy) -> TextReducer:
    found = parse(strategy)
    if not isinstance(found, TextReducer):
        raise UserError(f"{found.slug} shortens no texts; dietcode and slimcode do")
    return found
