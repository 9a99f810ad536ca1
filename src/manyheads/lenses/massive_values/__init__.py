# SPDX-License-Identifier: Apache-2.0
"""A few channels of queries and keys that are far larger than the others, and what a model can no longer do without.

*Massive Values in Self-Attention Modules are the Key to Contextual Knowledge Understanding* (ICML 2025,
arXiv 2502.01563). For a prompt, a layer and a head, ``M_j = |X[:, j]|_2`` over the tokens, X the queries, keys or
values as attention sees them, after rotary positions. A channel is massive where ``M_j > lambda mean_j' M_j'``. Rotary
positions are said to gather such channels at slow pairs, the same in nearly all heads of Q and K of a layer; values,
and models without rotary positions, have none. What is read from the prompt is said to hang on them, and what the
weights know is not.

    manyheads.watch(model, "massive_values")             looks, and changes no bit
    manyheads.use(model, "massive_values:damage=top")    replaces the largest channels by their mean
    manyheads.use(model, "massive_values.round_keys")    rounds keys, the largest channels kept exact or not

The damage: in every layer, when more than one token is read, the ``channels`` largest (or smallest, or random)
channels of each head of Q, and those of K, become one number per head, their mean over tokens and chosen channels.

Tables: ``peak`` is ``max_j M_j / mean_j M_j``; ``massive`` counts the channels above lambda times the mean;
``agreement`` of a layer is the share of its heads whose largest pair is that of most heads (with two heads at least a
half). ``peak q before`` is the same before rotary positions: what it lacks, they made. LensResult.channels hold ``M``
over the square root of the number of tokens ``[L, H, d]``, and of rotary pairs ``sqrt(M_i^2 + M_{i+d/2}^2)``
``[L, H, P]`` with the fastest pair first, in the order of the model's own rotary tables. Values are paired alike, so
that their agreement has the same chance level. Where the port knows no pairs (learned positions, interleaved
rotations), every channel stands alone.

Deviations from the released code, which takes one prompt at a time (of several it chooses by the wrong axis): here each
row of a batch has its own choice and mean, and padding counts in neither. There the damaged keys land in the cache
because views are changed in place; here that is ``affect_cache``, on as there. In its Llama file the largest channels
become their maximum and the smallest their mean, which compares two things at once; here both become their mean, as
the paper has it, and ``by=max`` is the other.

Where paper and code are silent: a prompt read in pieces is damaged piece by piece (without ``affect_cache``: as far as
it was read). Cross-attention is looked at, never damaged. Where gradients flow, and where a cache holds something else
than the keys (latents, packed bits), the cache stays whole. lambda = 5 stands for "much larger than the others".
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...attention.rope import angle_step, unrotate
from ...call import AttentionCall, Site
from ...calls.edits import replace_channels
from ...errors import UserError
from ...lens import AttentionView, Lens, LensResult, Memory, RunningMean, stack_ragged, table_of
from ...strategy import AttentionEdit
from .channel_norms import agreement, massive, mean_over_prompts, notes, pair_norms, peak, tokens_per_turn
from .round_keys import RoundKeys

__all__ = ["MassiveValues", "RoundKeys", "agreement", "massive", "peak"]


@dataclass(frozen=True, kw_only=True)
class MassiveValues(Lens, AttentionEdit):
    """Norms of the channels of queries, keys and values, and selective damage to them.

    Attributes:
        threshold: lambda, how many times the mean norm of its head a massive channel has at least.
        damage: ``none`` looks only; the others say which channels are replaced.
        channels: k, how many of each head.
        of: what is damaged: queries and keys as in the paper, one of them, or values as a control.
        by: what the damaged channels become: their ``mean``, one number for all of a head; ``means``, each its own;
            ``max`` or ``min`` over all of a head; ``zero``.
        affect_cache: the cache keeps damaged keys and values, so that decoding sees them too.
        seed: of ``damage=random``.
    """

    threshold: float = field(default=5.0, metadata={"help": "lambda: massive is above this many times the mean norm"})
    damage: Literal["none", "top", "bottom", "random"] = field(
        default="none", metadata={"help": "which channels of each head become their mean; none only looks"}
    )
    channels: int = field(default=1, metadata={"help": "k: channels of each head that are damaged"})
    of: Literal["qk", "q", "k", "v"] = field(default="qk", metadata={"help": "what is damaged: qk, q, k or v"})
    by: Literal["mean", "means", "max", "min", "zero"] = field(
        default="mean", metadata={"help": "what they become: one mean of a head, one each, their max, min, or zero"}
    )
    affect_cache: bool = field(default=True, metadata={"help": "the cache keeps the damaged keys too"})
    seed: int = field(default=0, metadata={"help": "of damage=random"})

    @property
    def edits_model(self) -> bool:
        return self.damage != "none"

    def edit(self, call: AttentionCall) -> AttentionCall:
        if not (self.edits_model and self.channels) or call.site.kind == "cross" or call.q.shape[2] == 1:
            return call
        if call.cache is not None and self.affect_cache:
            raise UserError(
                "massive_values damages the cache of the model itself: add affect_cache=false, or use it alone"
            )
        length, size = call.q.shape[2], call.k.shape[2]
        # What stands in the cache was damaged when it came; what an edit put in front is no token.
        first = size - length if self.affect_cache else call.prepended
        keys = None if call.mask is None else call.mask.any(1).any(1)  # keys that anyone sees are no padding
        made = {}
        for name in self.of:
            whole = getattr(call, name)
            start = 0 if name == "q" else first
            part = whole[:, :, start:]
            valid = None if keys is None else keys[:, size - part.shape[2] :]
            damaged = self._damaged(part, valid, 3 * call.site.index + "qkv".index(name))
            if name != "q" and self.affect_cache and not whole.requires_grad:
                part.copy_(damaged)
                damaged = part
            made[name] = torch.cat([whole[:, :, :start], damaged], 2) if start else damaged
        return call.replace(**made)

    def _damaged(self, x: Tensor, valid: Tensor | None, salt: int) -> Tensor:
        """``x [B, H, T, d]`` with its chosen channels at their mean over the tokens that are ``valid [B or 1, T]``."""
        batch, heads, length, dim = x.shape
        if not 0 <= self.channels <= dim:
            raise UserError(
                f"massive_values: heads have {dim} channels, of which channels={self.channels} cannot be damaged"
            )
        if valid is None:
            valid = torch.ones(1, length, dtype=torch.bool, device=x.device)
        counted = valid.expand(batch, -1)[:, None, :, None]
        exact = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~counted, 0)
        if self.damage == "random":  # the same in every row, so that a batch is its rows
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + salt)
            order = torch.rand(heads, dim, generator=generator).argsort(-1).to(x.device).expand(batch, -1, -1)
        else:
            order = exact.detach().square().sum(2).argsort(dim=-1, descending=self.damage == "top", stable=True)
        chosen = order[..., : self.channels]
        return replace_channels(x, chosen, self._value(x.to(exact.dtype), chosen, counted))

    def _value(self, x: Tensor, chosen: Tensor, counted: Tensor) -> Tensor:
        """What the ``chosen [B, H, n]`` channels become: ``[B, H, 1, 1 or n]``."""
        taken = x.gather(3, chosen[:, :, None].expand(-1, -1, x.shape[2], -1))
        if self.by in ("max", "min"):
            sign = 1 if self.by == "max" else -1
            found = (sign * taken).masked_fill(~counted, -torch.inf).amax((2, 3), keepdim=True)
            return torch.where(found.isfinite(), sign * found, 0)
        if self.by == "zero":
            return torch.zeros_like(taken[:, :, :1])
        each = taken.masked_fill(~counted, 0).sum(2, keepdim=True) / counted.sum(2, keepdim=True).clamp(min=1)
        return each if self.by == "means" else each.mean(-1, keepdim=True)

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        if not self.edits_model:
            super().watch(call, out)

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        call, length = view.call, view.call.q.shape[2]
        new = slice(call.k.shape[2] - length, None)
        told = {"q": (call.q, view.valid)}
        if not view.cross:
            told |= {"k": (call.k[:, :, new], view.valid), "v": (call.v[:, :, new], view.valid)}
        elif view.fresh:  # the keys of another sequence are the same in every step
            told |= {"k": (call.k, view.keys), "v": (call.v, view.keys)}
        if call.rotary is not None and not view.cross:
            view.memory["rotary"] = call.rotary[0].shape[-1]
            told |= {f"{name} before": (unrotate(told[name][0], call.rotary), view.valid) for name in "qk"}
            self._pace(view)
        for name, (x, valid) in told.items():
            square = x.to(torch.promote_types(x.dtype, torch.float32)).square()
            total = square.masked_fill(~valid[:, None, :, None], 0).sum(2)
            view.memory.setdefault(name, RunningMean()).add(total, valid.sum(1)[:, None, None], view.fresh)

    @staticmethod
    def _pace(view: AttentionView) -> None:
        """Keep how far each rotary pair turns from token to token, as the longest prompt shows it."""
        rotary, length = view.call.rotary, view.call.q.shape[2]
        if rotary is None or length <= view.memory.get("longest", 1):
            return
        row = view.valid.sum(1).argmax()[None]
        valid = view.valid[row]
        places = torch.where(valid, valid.long().cumsum(1) - 1, -1)
        cos, sin = (x.expand(len(view.valid), -1, -1)[row] for x in rotary)
        view.memory |= {"longest": length, "pace": angle_step((cos, sin), places)[0].abs()}

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        found = LensResult()
        for name in ("q", "k", "v", "q before", "k before"):
            here = [(site, memory) for site, memory in sites if name in memory]
            if not here:
                continue
            norms = [np.sqrt(memory[name].mean()) for _, memory in here]
            scores = {"peak": [peak(norm) for norm in norms]}
            if name in "qkv":
                pairs = [pair_norms(norm, memory) for norm, (_, memory) in zip(norms, here, strict=True)]
                scores["massive"] = [massive(norm, self.threshold) for norm in norms]
                scores["agreement"] = [agreement(pair) for pair in pairs]
                found.channels[name] = stack_ragged([mean_over_prompts(norm) for norm in norms])
                found.channels[f"{name} pairs"] = stack_ragged([mean_over_prompts(pair) for pair in pairs])
            for score, rows in scores.items():
                found.tables[f"{score} {name}"] = table_of(
                    f"{score} {name}", [site for site, _ in here], rows, lens=self.spec, share=score == "agreement"
                )
        if any("pace" in memory for _, memory in sites):
            found.channels["tokens a turn"] = stack_ragged([tokens_per_turn(memory) for _, memory in sites])
        found.notes = notes(found, self.threshold)
        return found
