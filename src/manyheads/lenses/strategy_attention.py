# SPDX-License-Identifier: Apache-2.0
"""How much of a reply's attention goes to an instruction, whatever the length of the dialogue around it.

"Steering Conversational Large Language Models for Long Emotional Support Conversations" (no arXiv id is known to us).
For an instruction of ``n`` tokens, the set ``I``, and a reply of R tokens, over M layers of H heads with weights ``A``,

    SRA = 1/(n R) sum over r, s in I of 1/(M H) sum over m, h of A[m, h, r, s],

the weight that a token of the instruction gets from a token of the reply. The paper prints ``n - 1`` for ``n`` but sums
over all n; here it is n. It reports ``log SRA``, and finds it to fall from turn to turn, and accuracy with it.

SRA falls as 1/length even where attention is uniform, so beside it stands the lift,

    lift = mean over r of (weight of a token of I at r) * (tokens that r may look at),

1 for uniform attention at any length; not in the paper. Every layer and head has its own SRA and lift: those of the
greatest lift are the instruction heads. An instruction that is out of reach of a sliding window gets 0 there.

    roles = TokenSpans({"system": [[(5, 17)]], "response": [[(90, 120)]]})  # of each row; without response: all behind
    with manyheads.watch(model, "strategy_attention", roles=roles) as seen, torch.no_grad():
        model(prompt_and_reply)  # one forward over what was generated before, or generate() itself

:func:`layout` is the paper's other half: where the history of a dialogue stands in the prompt. How the paper writes
history into a system message it does not say; here a line ``role: content`` for each message.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..call import AttentionCall, Site
from ..calls.statistics import Statistic, WeightedSum
from ..errors import UserError
from ..heads import HeadTable, listed
from ..lens import AttentionView, Lens, LensResult, Memory, table

__all__ = ["Layout", "StrategyAttention", "layout", "paired_difference", "per_turn", "span_of", "sra"]

Layout = Literal["standard", "c1_hf", "c1_hl", "c3_hf", "c3_hl", "c5_hf", "c5_hl"]
Message = dict[str, str]


def layout(messages: Sequence[Message], strategy: str, form: Layout = "standard") -> list[Message]:
    """Chat messages with the strategy in the system message and the history where ``form`` puts it.

    ``standard``: the whole history as turns. ``cN_hf``, ``cN_hl``: the last N messages as turns, what came before at
    the beginning (history first) or the end (history last) of the system message.

    Args:
        messages: ``{"role": ..., "content": ...}`` in order; a system message, if any, first.
        strategy: the instruction for the reply.
        form: where the history goes.

    Raises:
        UserError: no such form.
    """
    system = [m["content"] for m in messages if m["role"] == "system"]
    turns = [m for m in messages if m["role"] != "system"]
    count, _, order = form.removeprefix("c").partition("_")
    if form == "standard":
        history, recent = [], turns
    elif count.isdecimal() and int(count) > 0 and order in ("hf", "hl"):
        history, recent = turns[: -int(count)], turns[-int(count) :]
    else:
        raise UserError(f"{form!r} is no layout; write standard, cN_hf or cN_hl, N the messages that stay turns")
    told = ["\n".join(f"{m['role']}: {m['content']}" for m in history)] if history else []
    parts = [*told, *system, strategy] if order == "hf" else [*system, strategy, *told]
    return [{"role": "system", "content": "\n\n".join(parts)}, *recent]


def span_of(text: str, part: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Tokens ``(start, stop)`` of the first ``part`` of ``text``, given every token's characters, as tokenizers tell.

    Raises:
        UserError: ``part`` is not in ``text``, or in no token.
    """
    first = text.find(part)
    tokens = [i for i, (a, b) in enumerate(offsets) if a < first + len(part) and b > first and b > a]
    if first < 0 or not tokens:
        raise UserError(f"{part[:40]!r} is in no token of the text")
    return tokens[0], tokens[-1] + 1


def per_turn(series: Any, turns: Sequence[tuple[int, int]]) -> Any:
    """The curve of turns: mean of one prompt's ``series [T]`` over each span of ``turns``, NaN where none is known."""
    parts = [np.asarray(series)[start:stop] for start, stop in turns]
    return np.array([part[np.isfinite(part)].mean() if np.isfinite(part).any() else np.nan for part in parts])


def sra(scores: HeadTable) -> Any:
    """The mean of ``scores`` over all layers and heads, for each prompt: ``[N]``."""
    return np.array([row[np.isfinite(row)].mean() if np.isfinite(row).any() else np.nan for row in scores.values])


def paired_difference(first: Any, second: Any, seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``first - second``, values ``[N]`` of the same dialogues, and its 95 % interval by a bootstrap over them.

    Raises:
        UserError: not as many of both.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape:
        raise UserError(f"{first.size} dialogues cannot be paired with {second.size}")
    difference = HeadTable("difference", ("all",), (first - second)[:, None, None])
    low, high = difference.interval(seed)
    return float(difference.mean[0, 0]), float(low[0, 0]), float(high[0, 0])


def _reach(call: AttentionCall, keys: Tensor) -> Tensor:
    """``[B, T]``, how many tokens each query may look at."""
    length, size = call.q.shape[2], keys.shape[1]
    if call.mask is None and call.is_causal:
        return keys.long().cumsum(1)[:, size - length :]
    seen = call.allowed()
    if seen is None:
        return keys.sum(1, keepdim=True).expand(-1, length)
    return seen.sum(-1).amax(1).expand(keys.shape[0], length)


def _divisor(count: Tensor) -> Tensor:
    """``[B, 1, 1]`` of ``count [B]``, NaN for none."""
    return count[:, None, None].float().masked_fill(count[:, None, None] == 0, torch.nan)


@dataclass(frozen=True, kw_only=True)
class StrategyAttention(Lens):
    """Weight and lift of the tokens of an instruction, for each head, reply and token of a reply."""

    span: str = field(default="system", metadata={"help": "role of the tokens that are looked at"})
    rows: str = field(default="response", metadata={"help": "role of the tokens that look"})
    at: Literal["self", "cross"] = field(
        default="self", metadata={"help": "self-attention (of the decoder, where there is one) or cross-attention"}
    )

    def selects(self, site: Site) -> bool:
        if not super().selects(site) or (site.kind == "cross") != (self.at == "cross"):
            return False
        return site.kind == "cross" or site.causal or not site.peers

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        given = view.roles.source if view.cross else view.roles.spans
        for role, known in ((self.span, given), (self.rows, view.roles.spans)):
            if role not in (*known, "bos", "response"):
                where = ", source=" if known is view.roles.source else ""
                raise UserError(
                    f"strategy_attention looks for tokens of the role {role!r}, and none are given: watch with "
                    f"roles=TokenSpans({where}{{{role!r}: [[(first, last + 1)]]}}), or set its field span or rows"
                )
        column = view.once(("column", self.span), lambda: view.columns(self.span)[..., None].float())
        return {"mass": WeightedSum(column)}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        memory = view.memory
        count = view.once(("count", self.span), lambda: view.columns(self.span).sum(1))
        if view.fresh or "count" not in memory:
            divisor = view.once(("divisor", self.span), lambda: _divisor(count))
        else:  # a sliding window may have left some behind
            count = torch.maximum(count, memory["count"])
            divisor = _divisor(count)
        memory["count"] = count
        rows = view.rows(self.rows)
        weight = found["mass"][..., 0] / divisor.to(found["mass"].dtype)
        lift = weight * view.once("reach", lambda: _reach(view.call, view.keys))[:, None]
        for name, value in (("sra", weight), ("lift", lift)):
            view.add_mean(name, value, rows[:, None])
            view.add_tokens(f"{name} of tokens", value.mean(1), rows)

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        names = {"sra": f"weight of a token of {self.span}", "lift": f"lift of {self.span} over uniform attention"}
        tables = {key: table(name, sites, key, span=self.span, rows=self.rows) for key, name in names.items()}
        series = {}
        for key in names:
            rows = [memory[f"{key} of tokens"].rows() for _, memory in sites]
            series[key] = [np.mean([site[n] for site in rows], 0) for n in range(len(rows[0]))]
        return LensResult(tables, series, notes=self._notes(tables))

    def _notes(self, tables: dict[str, HeadTable]) -> list[str]:
        weight, lift = (sra(tables[key]) for key in ("sra", "lift"))
        known = np.isfinite(weight) & (weight > 0)
        if not known.any():
            return [f"No token of {self.rows} looks at a token of {self.span}."]
        return [
            f"A token of {self.span} gets {weight[known].mean():.2g} of the attention of one of {self.rows} (log SRA "
            f"{np.log(weight[known]).mean():.2f}), {lift[known].mean():.2f} times what uniform attention gives it.",
            f"Instruction heads, by lift: {listed(tables['lift'], tables['lift'].top(3), '.1f')}.",
        ]
