# SPDX-License-Identifier: Apache-2.0
"""How the cross-attention of a translation model treats multi-word expressions.

"Paying Attention to Multi-Word Expressions in Neural Machine Translation" (arXiv 1710.06313) extracts expressions, adds
them to the training data, and looks at pictures of the attention on them: a model that knows an expression attends to
it as a whole, each of its words from each word of its translation. What is measured of that here is ours. For an
expression at the source tokens S, whose translation is said at the target rows T, of weights ``a[t, s]`` on J tokens:

    focus     mean over T of sum over S of a[t, s]      1 where nothing else is attended to
    lift      focus J / |S|                             1 for even attention
    evenness  mean over T of H(a[t, S] / sum) / log |S| 1 where all of its tokens are attended to alike
    block     s_1^2 / sum s_i^2 of a[T, S]              1 where all rows attend to it alike (singular values)
    spread    mean over T of H(a[t, :]), in nats        of the whole row

Evenness is NaN of a single source token, the block of a single row or token. Every head has its own values; those of
an expression are of the mean over the heads of a layer, the last but one where ``layers`` does not name others.

    spans = TokenSpans({"expression": [[(2, 4)]]}, source={"expression": [[(3, 6)]]})  # pair by pair, row by row
    with manyheads.watch(model, "mwe_attention", roles=spans) as seen, torch.no_grad():
        model(**batch)
    seen.compute().records["expressions"]

:mod:`.extraction` finds expressions in a corpus and matches them across languages; :func:`~.extraction.augmented` is
the paper's change of the training data.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...call import Site
from ...calls.statistics import Statistic
from ...errors import UserError
from ...lens import AttentionView, Lens, LensResult, Memory, table_of

__all__ = ["MEASURES", "MweAttention", "measures"]

MEASURES = ("focus", "lift", "evenness", "block", "spread")
Span = tuple[int, int]


def measures(block: Tensor, sources: int, spread: Tensor) -> dict[str, Tensor]:
    """The measures of an expression, by name, ``[H]`` each.

    Args:
        block: ``[H, T, S]``, weights of the rows of its translation on its tokens.
        sources: J, tokens of the sentence.
        spread: ``[H, T]``, entropy of the whole rows.
    """
    block = block.double()
    inside, count = block.sum(-1), block.shape[2]
    share = torch.where(inside[..., None] > 0, block / inside[..., None], 0.0)
    energy = torch.linalg.svdvals(block) ** 2
    focus, none = inside.mean(-1), block.new_full(block.shape[:1], torch.nan)
    return {
        "focus": focus,
        "lift": focus * sources / count,
        "evenness": none if count == 1 else -torch.xlogy(share, share).sum(-1).mean(-1) / np.log(count),
        "block": none if min(block.shape[1:]) == 1 else energy[:, 0] / energy.sum(-1),
        "spread": spread.double().mean(-1),
    }


@dataclass
class Blocks:
    """The statistic: the weights of each expression's rows on its tokens, and the entropy of those rows.

    Attributes:
        pairs: row of the batch, target rows, source tokens.
        sources: ``[B]``, tokens of each sentence.
    """

    pairs: Sequence[tuple[int, Span, Span]]
    sources: Tensor
    made: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)

    def update(self, rows: Tensor, start: int, length: int) -> None:
        self.made = self.made or [[] for _ in self.pairs]
        for kept, (b, (first, stop), (left, right)) in zip(self.made, self.pairs, strict=True):
            low, high = max(first - start, 0), min(stop - start, rows.shape[2])
            if low < high:
                mine = torch.cat([rows[b], rows[b].mean(0, keepdim=True)])[:, low:high].double()  # and their mean
                kept.append((mine[..., left:right], -torch.xlogy(mine, mine).sum(-1)))

    def result(self) -> list[dict[str, Tensor]]:
        """The measures of each expression, ``[H + 1]``, the last of the mean over heads."""
        return [
            measures(torch.cat([x for x, _ in kept], 1), int(self.sources[b]), torch.cat([x for _, x in kept], 1))
            for kept, (b, *_) in zip(self.made, self.pairs, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class MweAttention(Lens):
    """Focus, lift, evenness, block and spread of the attention on multi-word expressions."""

    kinds = frozenset({"cross"})

    role: str = field(default="expression", metadata={"help": "role of the tokens of expressions, on both sides"})

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        sides = (view.roles.spans.get(self.role), view.roles.source.get(self.role))
        batch = view.keys.shape[0]
        if any(side is None or len(side) != batch for side in sides):
            raise UserError(
                f"mwe_attention looks for expressions and their translations: watch with roles=TokenSpans("
                f"{{{self.role!r}: rows}}, source={{{self.role!r}: rows}}), spans for each of the {batch} sentences"
            )
        pairs: list[tuple[int, Span, Span]] = []
        for b, (said, stands) in enumerate(zip(*sides, strict=True)):  # type: ignore[arg-type]
            if len(said) != len(stands):
                raise UserError(f"sentence {b} has {len(stands)} expressions and {len(said)} translations of them")
            pairs += [(b, t, s) for t, s in zip(said, stands, strict=True)]
        view.memory["of"] = [b for b, *_ in pairs]
        return {"blocks": Blocks(pairs, view.keys.sum(1))} if pairs else {}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        memory = view.memory
        before = memory.get("prompts", 0)
        for b, one in zip(memory["of"], found.get("blocks", []), strict=True):
            values = np.stack([one[name].cpu().numpy() for name in MEASURES])
            memory.setdefault("found", []).append((before + b, values))
        memory["prompts"] = before + view.keys.shape[0]

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        every = [memory.get("found", []) for _, memory in sites]
        if not every[0]:
            return LensResult(notes=["No sentence has an expression with its translation."])
        values = np.stack([np.stack([x for _, x in one]) for one in every])  # [L, N, measures, H + 1]
        tables = {
            name: table_of(f"{name} of expressions", [site for site, _ in sites], list(values[:, :, i, :-1]))
            for i, name in enumerate(MEASURES)
        }
        chosen = slice(None) if self.layers else slice(max(0, len(every) - 2), max(0, len(every) - 2) + 1)
        means = values[chosen, :, :, -1].mean(0)
        records = [
            {"prompt": int(n), **dict(zip(MEASURES, map(float, row), strict=True))}
            for (n, _), row in zip(every[0], means, strict=True)
        ]
        said = ", ".join(f"{name} {np.nanmean(x):.2f}" for name, x in zip(MEASURES, means.T, strict=True) if not
                         np.isnan(x).all())  # fmt: skip
        return LensResult(tables, records={"expressions": records}, notes=[f"{len(records)} expressions: {said}."])
