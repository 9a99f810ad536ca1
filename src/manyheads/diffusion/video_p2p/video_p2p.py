# SPDX-License-Identifier: Apache-2.0
"""The strategy: what is taken from the source, where and when."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...call import AttentionCall, DenoiserCall, DiffusionStep, Site
from ...editing import PromptEditor
from ...errors import UserError
from ...strategy import AttentionCompute, AttentionWatch
from .._pairs import check_pairs, known_step, sdpa
from ._blend import BlendMaps, blended
from ._guidance import decoupled
from ._maps import by_words, in_joint, part
from ._pair import Edit, PromptPairs

__all__ = ["VideoP2P"]


@dataclass(frozen=True, kw_only=True)
class VideoP2P(PromptEditor, AttentionCompute, AttentionWatch):
    """Control of maps, local blend and decoupled guidance.

    Attributes:
        edit: how words are carried over; ``auto`` replaces where both prompts have as many, else refines.
        reweight: words of the target with factors on their columns.
        cross_steps, self_steps: shares of the steps in which maps are the source's.
        self_maps: which self-attention maps are.
        blend: whether latents stay the source's where no changed word acts.
        words: that act in the blend, in place of those that differ.
        blend_from: share of the steps after which it begins.
        threshold: of the blend's maps.
        map_size: largest side of a UNet's maps that are used.
        source: what the unconditional rows of an inverted source are.
        fits, rate: of the fitted embedding at each step.
        path: see :class:`PromptEditor`.
        prompts: of the rows of a branch, where the pipeline is given embeddings.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self", "joint", "cross"})

    edit: Edit = field(default="auto", metadata={"help": "how words are carried over"})
    reweight: tuple[str, ...] = field(default=(), metadata={"help": "target's words with factors, as ghost*2+frog*0.5"})
    cross_steps: float = field(default=0.2, metadata={"help": "share of the steps whose cross maps are the source's"})
    self_steps: float = field(default=0.5, metadata={"help": "share of the steps whose self maps are the source's"})
    self_maps: Literal["all", "temporal", "spatial"] = field(
        default="all", metadata={"help": "self maps that are; the released code's are temporal"}
    )
    blend: bool = field(default=True, metadata={"help": "keep the source where no changed word acts"})
    words: tuple[str, ...] = field(default=(), metadata={"help": "that the blend follows; those that differ if none"})
    blend_from: float = field(default=0.2, metadata={"help": "share of the steps after which the blend begins"})
    threshold: float = field(default=0.3, metadata={"help": "of the blend's maps, of the frame's greatest"})
    map_size: int = field(default=32, metadata={"help": "largest side of a UNet's maps that are used"})
    source: Literal["fitted", "unguided", "guided"] = field(
        default="fitted", metadata={"help": "guidance of an inverted source: by a fitted embedding, none, or as made"}
    )
    fits: int = field(default=10, metadata={"help": "steps of a fit at most"})
    rate: float = field(default=0.01, metadata={"help": "of a fit, which falls to half of it over the run"})
    path: Any = field(default=None, compare=False, repr=False, metadata={"help": "in Python: the inverted source"})
    prompts: Any = field(default=None, compare=False, repr=False, metadata={"help": "in Python: prompts as tokens"})

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing, factors that are none, and a path that is no tensor."""
        if not all(0 <= share <= 1 for share in (self.cross_steps, self.self_steps, self.blend_from)):
            raise UserError("video_p2p: cross_steps, self_steps and blend_from are shares of the steps, 0 to 1")
        if min(self.fits, self.map_size) < 1 or self.rate <= 0:
            raise UserError("video_p2p: fits and map_size count from 1, and rate is above 0")
        self.factors()
        if self.path is not None and not isinstance(self.path, Tensor):
            raise UserError("video_p2p: a path is given in Python, as path=pipe.path(latents, steps, prompt=...)")

    def factors(self) -> list[tuple[str, float]]:
        """Words with their factors.

        Raises:
            UserError: one is not written as word*factor.
        """
        found = []
        for text in self.reweight:
            word, _, factor = text.rpartition("*")
            try:
                found.append((word.strip(), float(factor)))
            except ValueError:
                word = ""
            if not word.strip():
                raise UserError(f"video_p2p: {text!r} is no word with its factor; write reweight=ghost*2+frog*0.5")
        return found

    def attend(self, call: AttentionCall) -> Tensor | None:
        step, kind = known_step(call, self.slug), call.site.kind
        kept, branch = self._kept(step), _conditional(step)
        if step.branches == ("unknown",):
            check_pairs(call, step, self.slug)
        if branch is None or "pairs" not in kept or not self._used(call.site, step, call.q.shape[2]):
            return None
        words = _early(step, self.cross_steps) and kind != "self"
        where = "temporal" if step.axis == "time" else "spatial"
        own = _early(step, self.self_steps) and kind != "cross" and self.self_maps in ("all", where)
        if not (words or own):
            return None
        check_pairs(call, step, self.slug)
        made, pairs = sdpa(call, call.k, call.v), kept["pairs"]
        rows = torch.arange(len(call.q), device=call.q.device)[step.rows(branch, len(call.q))]
        there, here = rows.chunk(2)
        if kind == "cross":
            made[here] = by_words(call, (there, here), pairs.columns(call.k.shape[2], call.v))
        elif kind == "self":
            made[here] = sdpa(part(call, there), call.k[there], call.v[here])
        elif step.layout is None:
            raise UserError(f"video_p2p: the token layout of {call.site.name} is not known")
        else:
            image = step.layout.image(call.q.shape[2])
            text = slice(0, image.start) if step.layout.text_first else slice(image.stop, call.q.shape[2])
            columns = pairs.columns(text.stop - text.start, call.v) if words else None
            made[here, image] = in_joint(call, (there, here), columns, own, text, image)
        return made

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        step = call.diffusion
        if not self.blend or step is None or step.layout is None or call.site.kind == "self":
            return
        kept, branch = self._kept(step), _conditional(step)
        if branch is not None and "pairs" in kept and self._used(call.site, step, call.q.shape[2]):
            rows = torch.arange(len(call.q), device=call.q.device)[step.rows(branch, len(call.q))]
            kept["maps"].add(part(call, rows), step.layout, kept["pairs"].differing())

    def denoise(self, call: DenoiserCall) -> Tensor:
        step = call.step
        if step.index is None or step.branches == ("unknown",):
            raise UserError("video_p2p has to know step and branches: open the pipeline, not its denoiser")
        if call.rescales:
            raise UserError("video_p2p: give guidance_rescale=0, which would change the source")
        kept = self._opened(call)
        out = call.predict()
        if call.guidance_scale is not None and self._decouples:
            fit = {"path": self.path, "most": self.fits, "rate": self.rate} if self.source == "fitted" else None
            out = decoupled(call, out, kept, fit)
        mask = self._mask(step, kept) if self.blend else None
        return out if mask is None else blended(call, out, mask.to(out.device))

    @property
    def _decouples(self) -> bool:
        return self.source == "unguided" or (self.source == "fitted" and self.path is not None)

    def _kept(self, step: DiffusionStep) -> dict[str, Any]:
        """What a run knows: pairs of prompts, maps of the blend, and of guidance what the steps before left."""
        kept: dict[str, Any] = step.run_state.setdefault(f"video_p2p {id(self)}", {"owner": self})
        return kept

    def _opened(self, call: DenoiserCall) -> dict[str, Any]:
        kept = self._kept(call.step)
        if "pairs" not in kept:
            texts = self.prompts or (call.prompts() if call.prompts is not None else ())
            rows = len(call.latents) // len(call.step.branches)
            if rows % 2 or len(texts) != rows:
                raise UserError(
                    f"video_p2p: {len(texts)} prompts for {rows} rows are no pairs of source and target; give the "
                    "pipeline the prompts of the sources, then those of their targets"
                )
            pairs = list(zip(texts[: rows // 2], texts[rows // 2 :], strict=True))
            kept.update(pairs=PromptPairs(pairs, self.edit, self.factors(), self.words), maps=BlendMaps())
        return kept

    def _mask(self, step: DiffusionStep, kept: dict[str, Any]) -> Tensor | None:
        """Where targets are their own, boolean ``[P, F, h, w]``; None where all of each is.

        A pair in which no word differs is nowhere.
        """
        differ = torch.tensor([bool(there or here) for there, here in kept["pairs"].differing()])[:, None, None, None]
        if _early(step, self.blend_from) or not bool(differ.any()):
            return None if bool(differ.all()) else differ
        if step.layout is None:
            raise UserError("video_p2p: the token layout of this denoiser is not known, so that it cannot be blended")
        mask: Tensor = kept["maps"].mask(step.layout, self.threshold)
        return mask & differ.to(mask.device)

    def _used(self, site: Site, step: DiffusionStep, length: int) -> bool:
        """Whether maps of so many queries are: all but those of text alone and the finest of a UNet."""
        if step.axis in ("time", "text") or not site.name.startswith(("down_blocks", "up_blocks", "mid_block")):
            return step.axis != "text"
        size = None if step.layout is None else step.layout.grid(length)
        return size is None or max(size) <= self.map_size


def _early(step: DiffusionStep, share: float) -> bool:
    return step.index is not None and step.index < share * (step.total or 1)


def _conditional(step: DiffusionStep) -> str | None:
    """The branch whose maps are changed, None where it is not at hand."""
    return next((name for name in ("cond", "all") if name in step.branches), None)
