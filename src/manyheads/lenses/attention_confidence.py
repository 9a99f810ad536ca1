# SPDX-License-Identifier: Apache-2.0
"""How sure a translation model was of a translation, from its cross-attention alone.

"Confidence through Attention" (arXiv 1710.03743, MT Summit 2017). The weights of I target tokens on J source
tokens, ``a[j, i]``, are a soft alignment. Of a good translation each source token is attended to about once, and each
token of either side is aligned to few of the other. With ``H(p) = -sum p log p``,

    CDP    =  1/J sum over j of log 1 / (1 + |1 - sum_i a[j, i]|^w)           coverage deviation penalty, w = 6
    AP_in  = -1/J sum over j of H(a[j, :] / sum_i a[j, i])                    absentmindedness penalty of the source
    AP_out = -1/I sum over i of H(a[:, i] / sum_j a[j, i])                    of the target
    confidence = CDP + AP_in + AP_out,

all of them 0 at best and else negative, in nats. The token that ends a sentence counts, and so do parts of words. The
paper squares the deviation (``w=2``, from memory); the released code has 6, which is the default here. What that code
gives 100, a translation of one token or none, is NaN here; a source token that nothing attends to has an entropy of 0,
where the code divides by zero.

The paper's models have one cross-attention. A Transformer has one in each layer and head: here ``a`` is the mean over
the heads of a layer (of some, with ``heads``), the last but one where ``layers`` does not name others, and the mean of
several layers' scores. Every head has scores of its own in the tables. Sums over target tokens are all that is kept,
``[H, J]``, so that the map of a long input is never whole in memory.

    rows = TokenSpans({"target": [[(0, 11)], [(0, 9)]]})  # of each sentence, its end included; without it, all rows
    with manyheads.watch(model, "attention_confidence", roles=rows) as seen, torch.no_grad():
        model(**batch)  # what was translated, as decoder_input_ids
    seen.compute().records["sentences"]

With ``at=self`` a decoder that translates in its context is looked at: the roles ``source`` and ``target`` name the
tokens of either side. Weights outside of ``source``, which may be named for cross-attention too, are left out and the
rest of a row sums to 1; ``outside`` is what was left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..call import Site
from ..calls.statistics import Statistic
from ..errors import UserError
from ..lens import AttentionView, Lens, LensResult, Memory, table_of

__all__ = ["AttentionConfidence", "hybrid", "scores"]

PARTS = ("confidence", "CDP", "AP_in", "AP_out")


def scores(alignment: Any, w: float = 6.0) -> dict[str, float]:
    """The scores of one soft alignment, ``confidence``, ``CDP``, ``AP_in`` and ``AP_out``; NaN for a single target.

    Args:
        alignment: ``[J, I]``, weights of I target tokens on J source tokens.
        w: power of the deviation from a coverage of 1.
    """
    a = torch.as_tensor(np.asarray(alignment, dtype=np.float64))[None, None]
    held = Soft(torch.ones(1, a.shape[2], dtype=torch.bool), torch.ones(1, a.shape[3], dtype=torch.bool))
    held.update(a.transpose(2, 3), 0, a.shape[3])
    return {name: float(x[0, 0]) for name, x in _scores([held.result()], w).items()}


def hybrid(first: Any, second: Any, doubtful: float | None = None) -> Any:
    """Which of two systems' translations to take, ``[N]``: True for the second, the one of the greater confidence.

    Args:
        first, second: ``[N]`` confidences.
        doubtful: a confidence above this is not trusted where the other one is below, as in the released code, which
            has -1.5; None for the plain rule.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    taken = second > first
    return taken if doubtful is None else taken ^ ((first > doubtful) != (second > doubtful))


@dataclass
class Sums:
    """What is kept of a batch's alignment: of each head, and behind them of their mean.

    Attributes:
        mass, product: ``[B, H + 1, J]``, sums over target tokens of ``a`` and ``a log a``.
        entropy, outside: ``[B, H + 1]``, sums over target tokens of their entropy, and of the mass on other tokens.
        targets: ``[B]``, target tokens.
        source: ``[B, J]``, the columns that are source tokens.
    """

    mass: Tensor
    product: Tensor
    entropy: Tensor
    outside: Tensor
    targets: Tensor
    source: Tensor

    def plus(self, more: "Sums") -> "Sums":
        """With those of tokens decoded after them, which may see columns that came since."""
        wider = more.mass.shape[2] - self.mass.shape[2]
        mass, product = (pad(x, (0, wider)) for x in (self.mass, self.product))
        return Sums(
            mass + more.mass, product + more.product, self.entropy + more.entropy, self.outside + more.outside,
            self.targets + more.targets, pad(self.source, (0, wider)) | more.source,
        )  # fmt: skip


@dataclass
class Soft:
    """The statistic: :class:`Sums` of a call.

    Attributes:
        columns: ``[B, S]``, source tokens.
        rows: ``[B, T]``, target tokens.
        heads: whose mean is taken; all when empty.
        whole: bring what a target token gives to the source to a sum of 1; else it counts as it is.
    """

    columns: Tensor
    rows: Tensor
    heads: tuple[int, ...] = ()
    whole: bool = False
    made: Sums | None = None

    def update(self, rows: Tensor, start: int, length: int) -> None:
        rows = rows.double()  # entropies are differences of these sums
        chosen = rows[:, list(self.heads)] if self.heads else rows
        a = torch.cat([rows, chosen.mean(1, keepdim=True)], 1) * self.columns[:, None, None]
        count = self.rows[:, None, start : start + rows.shape[2]].to(a.dtype)  # [B, 1, t]
        inside = a.sum(-1)
        share = torch.where(inside[..., None] > 0, a / inside[..., None], 0.0)
        entropy = -torch.xlogy(share, share).sum(-1)
        a = (share if self.whole else a) * count[..., None]
        made = Sums(
            a.sum(2), torch.xlogy(a, a).sum(2), (entropy * count).sum(2), ((1 - inside) * count).sum(2),
            count[:, 0].sum(1), self.columns,
        )  # fmt: skip
        self.made = made if self.made is None else self.made.plus(made)

    def result(self) -> Sums:
        assert self.made is not None
        return self.made


def _scores(parts: Sequence[Sums], w: float) -> dict[str, Any]:
    """Scores ``[N, H + 1]`` of the prompts of all ``parts``."""
    found: dict[str, list[Any]] = {name: [] for name in (*PARTS, "outside")}
    for part in parts:
        mass, product = part.mass.double().cpu(), part.product.double().cpu()
        source = part.source.cpu()[:, None].double()
        targets, sources = part.targets.double().cpu()[:, None], source.sum(-1)
        cdp = -torch.log1p((1 - mass).abs() ** w)
        entropy = torch.where(mass > 0, mass.log() - product / mass, 0.0)  # of a row of a / mass
        mine = {
            "CDP": (cdp * source).sum(-1) / sources, "AP_in": -(entropy * source).sum(-1) / sources,
            "AP_out": -part.entropy.double().cpu() / targets, "outside": part.outside.double().cpu() / targets,
        }  # fmt: skip
        mine["confidence"] = mine["CDP"] + mine["AP_in"] + mine["AP_out"]
        for name, x in mine.items():
            found[name].append(x.masked_fill((targets <= 1).expand_as(x), torch.nan).numpy())
    return {name: np.concatenate(x) for name, x in found.items()}


@dataclass(frozen=True, kw_only=True)
class AttentionConfidence(Lens):
    """Coverage deviation and absentmindedness penalties of each translation, for each head and the mean over heads."""

    w: float = field(default=6.0, metadata={"help": "power of a source token's deviation from a coverage of 1"})
    heads: tuple[int, ...] = field(default=(), metadata={"help": "heads whose mean is the alignment; all when empty"})
    source: str = field(default="source", metadata={"help": "role of the source's tokens, where they are not all keys"})
    target: str = field(default="target", metadata={"help": "role of the target's rows, where they are not all"})
    at: Literal["cross", "self"] = field(
        default="cross",
        metadata={"help": "cross-attention, or self-attention of a decoder that reads both"},
    )

    def __post_init__(self) -> None:
        if not self.w > 0:
            raise UserError(f"w is the power of a deviation, above 0; {self.w:g} is not")

    def selects(self, site: Site) -> bool:
        if not super().selects(site) or (site.kind == "cross") != (self.at == "cross"):
            return False
        return site.kind == "cross" or site.causal

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        count = view.call.q.shape[1]
        if self.heads and not 0 <= min(self.heads) <= max(self.heads) < count:
            raise UserError(f"{view.call.site.name} has the heads 0 to {count - 1}; heads asks for {max(self.heads)}")
        given = view.roles.source if view.cross else view.roles.spans
        if not view.cross:
            for role in (self.source, self.target):
                if role not in (*given, "response"):
                    raise UserError(
                        f"attention_confidence at=self looks for tokens of the role {role!r}, and none are given: "
                        f"watch with roles=TokenSpans({{{role!r}: [[(first, last + 1)]]}})"
                    )
        rows = view.rows(self.target) if self.target in (*view.roles.spans, "response") else view.valid
        columns = view.columns(self.source) if self.source in given else view.keys
        return {"sums": Soft(columns, rows, self.heads, whole=self.source in given)}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        kept: list[Sums] = view.memory.setdefault("sums", [])
        if view.fresh or not kept:
            kept.append(found["sums"])
        else:
            kept[-1] = kept[-1].plus(found["sums"])

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        every = [_scores(memory["sums"], self.w) for _, memory in sites]
        where = [site for site, _ in sites]
        tables = {}
        for name in (*PARTS, *(["outside"] if any(x["outside"].max() > 1e-4 for x in every) else [])):
            tables[name] = table_of(_SAID[name], where, [x[name][:, :-1] for x in every], w=self.w)
            mean = f"{name}, heads averaged"
            tables[mean] = table_of(f"{_SAID[name]}, of the mean over heads", where, [x[name][:, -1] for x in every])
        chosen = range(len(every)) if self.layers else [max(0, len(every) - 2)]
        means = {name: np.mean([every[i][name][:, -1] for i in chosen], 0) for name in PARTS}
        order = np.argsort(means["confidence"], kind="stable")  # NaN last
        records = [{"prompt": int(n), **{name: float(means[name][n]) for name in PARTS}} for n in order]
        layers = [where[i].index if where[i].layer is None else where[i].layer for i in chosen]
        return LensResult(tables, records={"sentences": records}, notes=_notes(means["confidence"], layers))


_SAID = {
    "confidence": "confidence, nats below the best", "CDP": "coverage deviation penalty",
    "AP_in": "absentmindedness penalty of the source", "AP_out": "absentmindedness penalty of the target",
    "outside": "mass on other tokens than the source's",
}  # fmt: skip


def _notes(values: Any, layers: Sequence[int | None]) -> list[str]:
    known = np.flatnonzero(np.isfinite(values))
    if not known.size:
        return ["No translation has two tokens or more, and none has a confidence."]
    low, high = (int(known[pick(values[known])]) for pick in (np.argmin, np.argmax))
    named = ", ".join(map(str, layers))
    return [
        f"Confidence by layer {named}: {np.mean(values[known]):.2f} on the mean of {known.size} sentences, from "
        f"{values[low]:.2f} (prompt {low}) to {values[high]:.2f} (prompt {high}); 0 is the best."
    ]
