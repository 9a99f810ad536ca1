# SPDX-License-Identifier: Apache-2.0
"""Guidance away from a prediction whose chosen heads are perturbed (SoftPAG), and the search for those heads.

A second prediction is made with the attention of a few heads degraded, and the first is pushed away from it:

    eps = eps_orig + w (eps_orig - eps_pert).

Which heads are perturbed decides what improves. The maps are mixed with a degraded one, ``A' = (1 - u) A + u P``, and
for all four choices of P the result needs no map: with ``o`` the head's own output and one lerp,

    pag     P = identity                      o' = (1 - u) o + u v
    uniform P = 1 / N                         o' = (1 - u) o + u mean(v)
    seg     P = softmax of the mean query     o' = (1 - u) o + u attention(mean q, k, v)
    max     P = one-hot of the largest logit  o' = (1 - u) o + u v[argmax].

Fine-Grained Perturbation Guidance via Attention Head Selection (arXiv 2506.10978). ``u = 1`` with ``pag`` on all heads
of a layer is Perturbed-Attention Guidance (arXiv 2403.17377).

Shapes: q ``[B, H, T, d]``, outputs ``[B, T, H, dv]``; a prediction has the shape of the latents.

Choices. In joint attention the released code puts the identity on all tokens, text included, while diffusers' PAG
touches images only: ``scope`` says which; with ``image`` text rows are left alone, and ``uniform``, ``seg`` and ``max``
look at image keys only. With classifier-free guidance, the conditional rows are perturbed, and ``w`` counts on top of
the guided prediction, as in diffusers' PAG. Keys that no query may see are left out. Only self-attention and joint
attention are perturbed, in a pass of their own whose rows are named ``perturbed``; so guidance costs half as much again
as classifier-free guidance does.

:func:`hunt` is the bare search; :func:`manyheads.select_heads` makes and scores the images too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..attention.reference import repeat_kv
from ..call import AttentionCall, DenoiserCall, Site
from ..calls.edits import Heads, heads_at
from ..errors import UserError
from ..heads import HeadTable
from ..strategy import AttentionPatch, DenoiserPrediction
from ._prediction import add_guidance, select_batch

__all__ = ["HeadHunter", "hunt", "ranking"]

_BRANCH = "perturbed"


@dataclass(frozen=True, kw_only=True)
class HeadHunter(AttentionPatch, DenoiserPrediction):
    """Guidance by perturbing chosen heads.

    Attributes:
        heads: which, as ``layer.head`` joined by ``+``; none is no guidance.
        scale: w.
        strength: u, how much of the degraded map is mixed in.
        perturbation: the degraded map.
        scope: tokens of joint attention that are perturbed.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self", "joint"})

    heads: Heads = field(default=(), metadata={"help": "heads as 3.1+4.2: layer.head, joined by +"})
    scale: float = field(default=3.0, metadata={"help": "w: how far to push away from the perturbed prediction"})
    strength: float = field(default=0.25, metadata={"help": "u: how much of the degraded map is mixed in, 0 to 1"})
    perturbation: Literal["pag", "uniform", "seg", "max"] = field(
        default="pag",
        metadata={"help": "the degraded map: identity, uniform, mean query's, or the largest weight alone"},
    )
    scope: Literal["all", "image"] = field(default="all", metadata={"help": "tokens of joint attention it acts on"})

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"headhunter: strength is a share from 0 to 1, not {self.strength}")

    def selects(self, site: Site) -> bool:
        return super().selects(site) and bool(heads_at(self.heads, site))

    def denoise(self, call: DenoiserCall) -> Tensor:
        plain = call.predict()
        guided = call.guidance_scale is not None
        if not (self.heads and self.scale and self.strength) or (guided and call.step.branches == ("uncond",)):
            return plain
        rows = call.step.rows("cond", len(plain)) if "cond" in call.step.branches else slice(0, len(plain))
        degraded = call.predict(_BRANCH, **select_batch(call, rows))
        return add_guidance(call, plain, self.scale * (plain[rows] - degraded))

    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        step = call.diffusion
        if step is None or step.branches != (_BRANCH,):
            return out
        heads = heads_at(self.heads, call.site, out.shape[2])
        length = call.q.shape[2]
        at = slice(0, length)
        if self.scope == "image" and call.site.kind == "joint":
            if step.layout is None:
                raise UserError(f"headhunter: the token layout of {call.site.name} is not known; use scope=all")
            at = step.layout.image(length)
        made = out.clone()
        degraded = self.degraded(call, heads, at)
        made[:, at, heads] = torch.lerp(out[:, at, heads], degraded.to(out.dtype), self.strength)
        return made

    def degraded(self, call: AttentionCall, heads: list[int], at: slice) -> Tensor:
        """Outputs ``[B, t, n, dv]`` of ``heads`` under the degraded map, for the tokens ``at``."""
        k, v = (repeat_kv(x, call.q.shape[1])[:, heads, at] for x in (call.k, call.v))
        q = call.q[:, heads, at]
        if self.perturbation == "pag":
            return v.transpose(1, 2)
        hidden = torch.zeros(1, 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
        if call.mask is not None:
            hidden = ~call.mask.any(-2, keepdim=True)[..., at]
            hidden = hidden[:, heads] if hidden.shape[1] > 1 else hidden
        if self.perturbation in ("uniform", "seg"):
            x = q.mean(2, keepdim=True) @ k.transpose(-1, -2) * (call.scale if self.perturbation == "seg" else 0.0)
            return (x.masked_fill(hidden, -torch.inf).softmax(-1) @ v).expand_as(v).transpose(1, 2)
        best = [(part @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf).argmax(-1) for part in q.split(1024, 2)]
        return v.gather(2, torch.cat(best, 2)[..., None].expand(-1, -1, -1, v.shape[3])).transpose(1, 2)


def hunt(
    strategy: HeadHunter, candidates: Sequence[str], objective: Callable[[HeadHunter], float], *, rounds: int = 1,
    top: int = 24, progress: Callable[[int, int], None] | None = None, state: dict[str, Any] | None = None,
) -> tuple[HeadHunter, list[dict[str, float]]]:  # fmt: skip
    """HeadHunter: in each round score every remaining head added to those chosen so far, and keep the best ``top``.

    Args:
        strategy: scale, strength and perturbation; its heads are the start.
        candidates: ``layer.head`` names to try.
        objective: mean score of what is generated under a strategy, greater is better; always the same prompts and
            seeds.
        rounds: R; paper: 1 for general quality, 5 for a style.
        top: k heads of a round; paper: 24 for general quality, 3 for a style.
        progress: receives how many of how many scores are done.
        state: is filled as the search goes, and continued from if it holds an earlier search's (a plain dict of JSON
            types).

    Returns:
        The strategy with the heads found, and the scores of each round. Ties go to the first candidate by name order.
    """
    state = {} if state is None else state
    chosen: list[str] = list(state.setdefault("chosen", list(strategy.heads)))
    scores: list[dict[str, float]] = state.setdefault("scores", [])
    done, total = 0, rounds * len(candidates)
    for turn in range(rounds):
        if turn < len(scores) and scores[turn].get("done"):
            done += len(candidates)
            continue
        if turn == len(scores):
            scores.append({})
        for head in candidates:
            done += 1
            if head in chosen or head in scores[turn]:
                continue
            scores[turn][head] = objective(replace(strategy, heads=(*chosen, head)))
            if progress is not None:
                progress(done, total)
        ranked = sorted((h for h in scores[turn] if h != "done"), key=lambda h: (-scores[turn][h], _place(h)))
        chosen += ranked[:top]
        state["chosen"] = chosen
        scores[turn]["done"] = 1.0
    return replace(strategy, heads=tuple(chosen)), [{h: s for h, s in turn.items() if h != "done"} for turn in scores]


def ranking(
    scores: Sequence[Mapping[str, float]], layers: Sequence[int], heads: int, *, name: str = "score under guidance",
    about: dict[str, Any] | None = None,
) -> HeadTable:  # fmt: skip
    """Scores of heads as a table with ranks, intervals, JSON and plot; heads without a score are left out of them.

    Args:
        scores: each mapping, ``layer.head`` to a score, is one measurement of the same thing: a round of :func:`hunt`
            (``scores[:1]``; later rounds score heads beside those chosen before), or that of each of several seeds or
            prompts, over which the interval is taken.
        layers: rows of the table.
        heads: its columns.
        name: of the score.
        about: what it was measured on.

    Raises:
        UserError: a head that the table has no place for, or no scores.
    """
    if not scores:
        raise UserError("there are no scores to rank heads by")
    rows = {layer: row for row, layer in enumerate(layers)}
    values = np.full((len(scores), len(rows), heads), np.nan)
    for n, turn in enumerate(scores):
        for head, score in turn.items():
            layer, number = _place(head)
            if layer not in rows or number >= heads:
                raise UserError(f"head {head} is not among layers {sorted(rows)} of {heads} heads")
            values[n, rows[layer], number] = score
    return HeadTable(name, tuple(f"layer {layer}" for layer in rows), values, about or {}, tuple(rows))


def _place(head: str) -> tuple[int, int]:
    layer, _, number = head.partition(".")
    return int(layer), int(number)
