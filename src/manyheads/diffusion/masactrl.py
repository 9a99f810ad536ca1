# SPDX-License-Identifier: Apache-2.0
"""MasaCtrl: a target image made beside a source reads the source's keys and values in self-attention.

Both start from the same noise, so the target's layout can follow its own prompt while texture and identity come from
the source. From step S on, in the blocks from L on, the self-attention of the target asks with its own queries and
looks at keys and values of the source, in the same branch of classifier-free guidance (the unconditional target reads
the unconditional source):

    out_t = attention(q_t, k_s, v_s)

With masks, of the object in the source and of that in the target, the object looks at the object and the rest at the
rest: ``out = M_t attention(q_t, k_s, v_s | M_s) + (1 - M_t) attention(q_t, k_s, v_s | not M_s)``.

MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing (arXiv 2304.08465).

    with manyheads.use(pipe, "masactrl:start_step=4,start_layer=10"):
        pipe([source_prompt, target_prompt], latents=torch.cat([noise, noise]))

An image that was not generated is a source as well: :func:`invert` finds the noise that it would have come from.

Shapes: q, k, v ``[B, H, T, d]``; in every branch the first half of the rows are sources, the second their targets;
masks ``[rows, T]``.

Choices. A step is an evaluation of the denoiser, of which a solver of second order makes two for a timestep; of an
image's edit from a part of the schedule the first is step 0. Blocks are numbered in the order of the model (down,
middle, up), as the released code numbers them. In joint attention (not in the paper) only image tokens are exchanged
and the text stays the target's. Masks come from cross-attention (``tokens`` names words by their place in the prompt):
the maps of this step so far, averaged over heads and sites of at most ``map_size`` squared tokens, summed over the
words, scaled to [0, 1] for each image, cut at ``threshold``. A mask that is empty or full would leave a query nothing
to look at, and is not applied; so is every mask before the first cross-attention of a step. ``union`` adds the source's
keys to the target's own instead of replacing them, which the released code offers too.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..call import AttentionCall, DiffusionStep, Site
from ..calls.statistics import Columns
from ..calls.weights import measure
from ..errors import UserError
from ..strategy import AttentionCompute, AttentionWatch
from ._inversion import invert
from ._maps import check_words, merged, scaled
from ._pairs import check_pairs, known_step, of_rows, pairs, sdpa

__all__ = ["MasaCtrl", "invert"]

_KEY = "masactrl"


@dataclass(frozen=True, kw_only=True)
class MasaCtrl(AttentionCompute, AttentionWatch):
    """Mutual self-attention of a target with its source.

    Attributes:
        start_step: S, the first denoising step it acts at.
        start_layer: L, the first block it acts in.
        union: the target looks at the source's keys beside its own.
        tokens: words whose attention makes the masks, as places joined by ``+``; none for no masks.
        threshold: of the scaled maps.
        map_size: the largest side of a map that is used for masks.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self", "joint", "cross"})

    start_step: int = field(default=4, metadata={"help": "S: the first denoising step it acts at"})
    start_layer: int = field(default=10, metadata={"help": "L: the first block it acts in"})
    union: bool = field(default=False, metadata={"help": "look at the source's keys beside the target's own"})
    tokens: tuple[int, ...] = field(default=(), metadata={"help": "words for the masks, as places joined by +"})
    threshold: float = field(default=0.1, metadata={"help": "of the scaled maps"})
    map_size: int = field(default=16, metadata={"help": "largest side of a cross-attention map used for masks"})

    def selects(self, site: Site) -> bool:
        if not super().selects(site):
            return False
        if site.kind == "cross":
            return bool(self.tokens)
        return site.layer is not None and site.layer >= self.start_layer

    def acts(self, call: AttentionCall) -> DiffusionStep | None:
        """Where and when; None elsewhere.

        Raises:
            UserError: the step is not known, or the rows do not pair.
        """
        step = known_step(call, self.slug)
        if call.site.kind == "cross" or step.axis == "text" or (step.index or 0) < self.start_step:
            return None
        check_pairs(call, step, self.slug)
        return step

    def attend(self, call: AttentionCall) -> Tensor:
        step = self.acts(call)
        own = sdpa(call, call.k, call.v)
        if step is None:
            return own
        batch, _, length, _ = call.q.shape
        source, target = pairs(batch, len(step.branches), call.q.device)
        image = slice(0, length)
        if call.site.kind == "joint":
            if step.layout is None:
                raise UserError(f"masactrl: the token layout of {call.site.name} is not known")
            image = step.layout.image(length)
        k, v = (_exchanged(x, source, target, image, self.union) for x in (call.k, call.v))
        part = call.replace(q=call.q[target], mask=of_rows(call.mask, target), bias=of_rows(call.bias, target))
        masks = self.masks(step, batch, length) if call.site.kind == "self" and not self.union else None
        if masks is None:
            if self.union and part.mask is not None:
                part = part.replace(mask=torch.cat([part.mask, part.mask[..., image]], -1))
            out = sdpa(part, k, v)
        else:
            there, here = masks[source], masks[target]  # [rows, T]
            inside, outside = (sdpa(part.replace(mask=m[:, None, None]), k, v) for m in (there, ~there))
            out = torch.where(here[:, :, None, None], inside, outside)
            whole = there.all(1) | ~there.any(1)
            if whole.any():
                out = torch.where(whole[:, None, None, None], sdpa(part, k, v), out)
        made = own.clone()
        made[target] = out
        return made

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        step = call.diffusion
        if call.site.kind != "cross" or step is None or step.layout is None or step.index is None:
            return
        size = step.layout.grid(call.q.shape[2])
        if size is None or max(size) > self.map_size:
            return
        check_words(self.tokens, call.k.shape[2], self.slug)
        words = torch.tensor(self.tokens, device=call.k.device)
        maps = measure(call, [Columns(words)])[0].mean(1).sum(-1).unflatten(1, size)  # [B, h, w]
        kept: dict[Any, Any] = step.run_state.setdefault(_KEY, {})
        at = (step.index, step.branches)
        if kept.get("at") != at:
            theirs = kept["maps"] if kept.get("at") == (step.index, ("cond",)) else None
            kept.update(at=at, maps=[], cond=theirs)
        kept["maps"].append(maps)

    def masks(self, step: DiffusionStep, batch: int, length: int) -> Tensor | None:
        """Boolean ``[B, T]`` from the maps of this step so far, None if there are none; conditional rows decide.

        So they do where the conditional call of a step comes before the unconditional one.
        """
        kept = step.run_state.get(_KEY, {})
        size = None if step.layout is None else step.layout.grid(length)
        if not self.tokens or size is None or kept.get("at") != (step.index, step.branches):
            return None
        maps = (kept.get("cond") or kept["maps"])[: len(kept["maps"])]  # as far as this branch has come
        mean = merged([m.float() for m in maps])
        cut = (scaled(mean) > self.threshold).float()
        made = interpolate(cut[:, None], size=size, mode="nearest")[:, 0].flatten(1) > 0.5
        if "cond" in step.branches and len(step.branches) > 1:
            made = made[step.rows("cond", batch)].repeat(len(step.branches), 1)
        return made


def _exchanged(x: Tensor, source: Tensor, target: Tensor, image: slice, union: bool) -> Tensor:
    """Keys or values for the targets: the source's image tokens in place of, or behind, their own."""
    theirs = x[source][:, :, image]
    if union:
        return torch.cat([x[target], theirs], 2)
    return torch.cat([x[target][:, :, : image.start], theirs, x[target][:, :, image.stop :]], 2)
