# SPDX-License-Identifier: Apache-2.0
"""Video-P2P: a video or image is edited by its prompt; where words act stays as it was in the source.

Source and target are made side by side, in the same batch. The source is told its own prompt and comes out as it was;
the target is told another, and takes from the source

- *cross-attention maps* in the first steps: columns of words that both prompts have, or that take each other's place
  (``edit``: :mod:`._alignment`), times a factor for words that are to count more or less (``reweight``);
- *self-attention maps*, over time and within frames, in the first steps;
- *latents*, where none of the words that differ act (*local blend*): their maps, summed over steps and sites, largest
  of 3 x 3 neighbours, above a share of the frame's greatest, of source or target.

An inverted source comes out as it was under *decoupled guidance*: the target's unconditional rows are the prompt's "",
the source's are those of an embedding that is fitted at every step, one for all frames, so that the guided step leads
to where the inversion came from (``unguided``: the source is not guided at all, the released code's fast mode).

Video-P2P: Video Editing with Cross-attention Control (arXiv 2303.04761), after Prompt-to-Prompt (2208.01626) and
null-text inversion (2211.09794).

    with manyheads.use(pipe, "video_p2p"):  # a word swap, from the same noise
        pipe(["apple up frog", "ghost up frog"], latents=torch.cat([noise, noise]))

    path = pipe.path(video, steps, prompt="apple up frog")  # of one that was not made here: its inversion
    with manyheads.use(pipe, VideoP2P(path=path)):
        pipe(["apple up frog", "ghost up frog"], latents=torch.cat([path[0]] * 2), num_inference_steps=steps)

Maps are never made. With values V of the target's, ``(A_s M) V = A_s (M V)``: columns are carried over by mixing values
under the source's queries and keys, in fused attention.

Shapes: q, k, v ``[B, H, T, d]``; in every branch the first half of the rows are sources, the second their targets.

Choices. The paper first tunes an image model, inflated to frames, on the one clip; that is left out: a model of videos
takes its place. *Joint attention* (not in the paper) is taken apart for image queries: the share and distribution of
their attention over text are the cross-attention map, the distribution over image tokens is the self-attention map;
what text leaves is the image's. Text queries stay the target's own. ``self_maps=temporal`` is what the released code
does, whose hook misses attention within frames. In UNets, maps of a grid finer than ``map_size`` are left alone; other
denoisers have but one grid. Maps of the local blend are those before they are edited, at all such sites. Where both
prompts are the same and nothing is reweighted, no word differs: the target is the source, bit for bit. The blend is
written into the target's predictions, so that any sampler carries it: where the steps of the scheduler are known
(:func:`.levels`) the next latents are the source's at once, else they come to it by the last step.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ..call import AttentionCall, DenoiserCall, DiffusionStep, Prompt, Site
from ..calls.statistics import WeightedSum
from ..calls.weights import measure
from ..editing import PromptEditor
from ..errors import UserError
from ..strategy import AttentionCompute, AttentionWatch
from ._alignment import changed, factors, refinement, replacement, same_number
from ._inversion import affine, fitted, levels, path
from ._maps import grid_of, merged, select_queries, to_grid
from ._pairs import check_pairs, known_step, of_rows, sdpa
from ._prediction import Prediction, select_batch

__all__ = ["VideoP2P", "path"]

_CONDITIONAL = ("cond", "all")


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

    edit: Literal["auto", "replace", "refine"] = field(default="auto", metadata={"help": "how words are carried over"})
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
        """Refuse factors that are none, and a path that is no tensor."""
        self.factors  # noqa: B018
        if self.path is not None and not isinstance(self.path, Tensor):
            raise UserError("video_p2p: a path is given in Python, as path=pipe.path(latents, steps, prompt=...)")

    @property
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

    # What is known of a run

    def _run(self, run_state: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = run_state.setdefault(f"video_p2p {id(self)}", {})
        return kept

    def opened(self, call: DenoiserCall) -> dict[str, Any]:
        """What a run knows: ``texts``, pairs of prompts; ``maps`` of the blend by site; what it takes from elsewhere.

        Raises:
            UserError: the prompts are not known, or do not pair.
        """
        kept = self._run(call.step.run_state)
        if "texts" not in kept:
            texts = self.prompts or (call.prompts() if call.prompts is not None else ())
            rows = len(call.latents) // len(call.step.branches)
            if rows % 2 or len(texts) != rows:
                raise UserError(
                    f"video_p2p: {len(texts)} prompts for {rows} rows are no pairs of source and target; give the "
                    "pipeline the prompts of the sources, then those of their targets"
                )
            half = rows // 2
            kept.update(texts=list(zip(texts[:half], texts[half:], strict=True)), maps={}, owner=self)
        return kept

    def columns(self, kept: dict[str, Any], size: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """M ``[P, S, S]``, own share and factors ``[P, S]`` for the ``size`` text tokens of P pairs."""
        key = ("columns", size, like.device, like.dtype)
        if key not in kept:
            made = [self._aligned(source, target, size) for source, target in kept["texts"]]
            kept[key] = tuple(torch.stack(x).to(like) for x in zip(*made, strict=True))
        found: tuple[Tensor, Tensor, Tensor] = kept[key]
        return found

    def _aligned(
        self, source: tuple[Prompt, ...], target: tuple[Prompt, ...], size: int
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        whole = self.edit == "replace" or (self.edit == "auto" and same_number(source, target))
        matrix, own = (replacement if whole else refinement)(source, target, size)
        return matrix, own, factors(target, self.factors, size)

    def differing(self, kept: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
        """Places of the words that the blend follows, in source and target of each pair."""
        if "differing" not in kept:
            kept["differing"] = []
            for source, target in kept["texts"]:
                there, here = changed(source, target, self.words)
                if not self.words:
                    weighted = [changed(source, target, [word]) for word, _ in self.factors]
                    there, here = (x + [i for pair in weighted for i in pair[n]] for n, x in enumerate((there, here)))
                kept["differing"].append((there, here))
        found: list[tuple[list[int], list[int]]] = kept["differing"]
        return found

    # Attention

    def _within(self, step: DiffusionStep, share: float) -> bool:
        return step.index is not None and step.index < share * (step.total or 1)

    def _used(self, site: Site, step: DiffusionStep, length: int) -> bool:
        """Whether maps of so many queries are: all but the finest of a UNet."""
        if step.axis == "text":
            return False
        if step.axis == "time" or not site.name.startswith(("down_blocks", "up_blocks", "mid_block")):
            return True
        size = None if step.layout is None else step.layout.grid(length)
        return size is None or max(size) <= self.map_size

    def attend(self, call: AttentionCall) -> Tensor | None:
        step = known_step(call, self.slug)
        kept = self._run(step.run_state)
        branch = next((name for name in _CONDITIONAL if name in step.branches), None)
        if step.branches == ("unknown",):
            check_pairs(call, step, self.slug)
        if branch is None or "texts" not in kept or not self._used(call.site, step, call.q.shape[2]):
            return None
        kind = call.site.kind
        temporal = step.axis == "time"
        own = self._within(step, self.self_steps) and self.self_maps in ("all", "temporal" if temporal else "spatial")
        words = self._within(step, self.cross_steps)
        if not (words or own) if kind == "joint" else not (words if kind == "cross" else own):
            return None
        check_pairs(call, step, self.slug)
        made = sdpa(call, call.k, call.v)
        rows = torch.arange(call.q.shape[0], device=call.q.device)[step.rows(branch, call.q.shape[0])]
        there, here = rows.chunk(2)
        if kind == "joint":
            made[here] = self._joint(call, step, kept, (there, here), (words, own), made[here])
        elif kind == "self":
            made[here] = sdpa(_part(call, there), call.k[there], call.v[here])
        else:
            matrix, mine, factor = (_repeated(x, len(here)) for x in self.columns(kept, call.k.shape[2], call.v))
            v = call.v[here] * factor[:, None, :, None]
            made[here] = sdpa(_part(call, there), call.k[there], matrix[:, None] @ v)
            if bool(mine.any()):
                made[here] += sdpa(_part(call, here), call.k[here], v * mine[:, None, :, None])
        return made

    def _joint(
        self, call: AttentionCall, step: DiffusionStep, kept: dict[str, Any], pair: tuple[Tensor, Tensor],
        taken: tuple[bool, bool], out: Tensor,
    ) -> Tensor:  # fmt: skip
        """Output ``[rows, T, H, d]`` of the targets, of which image queries are changed in ``out``.

        Values have three more parts: those of text, those of the image, and two channels that sum the attention to
        either, so that one call of attention gives all that is put together below.
        """
        layout, length = step.layout, call.q.shape[2]
        if layout is None:
            raise UserError(f"video_p2p: the token layout of {call.site.name} is not known")
        image, (there, here), (words, own) = layout.image(length), pair, taken
        text = slice(0, image.start) if layout.text_first else slice(image.stop, length)
        matrix, mine, factor = (_repeated(x, len(here)) for x in self.columns(kept, text.stop - text.start, call.v))
        v, width = call.v[here], call.v.shape[-1]
        values = v[:, :, text] * factor[:, None, :, None] if words else v[:, :, text]
        matrix, mine = (matrix, mine) if words else (torch.zeros_like(matrix), torch.ones_like(mine))
        parts = []
        for rows, mixed, counted in (
            (there, matrix[:, None] @ values, matrix.sum(2)), (here, values * mine[:, None, :, None], mine),
        ):  # fmt: skip
            wide = v.new_zeros(*v.shape[:3], 2 * width + 2)
            wide[:, :, text, :width], wide[:, :, text, -2] = mixed, counted[:, None]
            wide[:, :, image, width : 2 * width], wide[:, :, image, -1] = v[:, :, image], 1.0
            asked = select_queries(_part(call, rows), image)
            parts.append(sdpa(asked, call.k[rows], wide).split((width, width, 1, 1), -1))
        (mixed, theirs, carried, seen), (kept_own, ours, left, looked) = parts
        share = (1 - carried - left).clamp(min=0)  # what text leaves to the image
        picture = theirs / seen.clamp(min=1e-12) if own else ours / looked.clamp(min=1e-12)
        out[:, image] = mixed + kept_own + share * picture
        return out

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        step = call.diffusion
        branch = None if step is None else next((name for name in _CONDITIONAL if name in step.branches), None)
        if not self.blend or step is None or step.layout is None or branch is None or call.site.kind == "self":
            return
        kept, length = self._run(step.run_state), call.q.shape[2]
        if "texts" not in kept or not self._used(call.site, step, length):
            return
        image = step.layout.image(length) if call.site.kind == "joint" else slice(0, length)
        rows = torch.arange(len(call.q), device=call.q.device)[step.rows(branch, len(call.q))]
        grid = grid_of(step.layout, image.stop - image.start, len(rows))
        if grid is None:
            return
        start = image.stop if call.site.kind == "joint" and not step.layout.text_first else 0
        features = torch.zeros(2, len(kept["texts"]), call.k.shape[2], device=call.q.device)
        for n, places in enumerate(self.differing(kept)):
            for side in (0, 1):
                features[side, n, [start + place for place in places[side]]] = 1.0
        asked = select_queries(_part(call, rows), image).replace(k=call.k[rows], v=call.v[rows])
        found = measure(asked, [WeightedSum(_repeated(features.flatten(0, 1), len(rows))[..., None])])[0]
        maps = to_grid(found.mean(1, keepdim=True), grid)[:, 0, 0]
        kept["maps"][call.site.name] = kept["maps"].get(call.site.name, 0) + maps

    # Predictions

    def denoise(self, call: DenoiserCall) -> Tensor:
        kept, step = self.opened(call), call.step
        if step.index is None or step.branches == ("unknown",):
            raise UserError("video_p2p has to know step and branches: open the pipeline, not its denoiser")
        if call.rescales:
            raise UserError("video_p2p: give guidance_rescale=0, which would change the source")
        out = call.predict().clone()
        if self.path is not None and call.guidance_scale is not None and self.source != "guided":
            self._decouple(call, kept, out)
        mask = self.mask(call, kept) if self.blend else None
        if mask is None:
            return out
        x, size = call.latents, len(out) // len(step.branches)
        toward = _toward(call)
        for start in range(0, len(out), size):
            (x_s, x_t), (out_s, out_t) = (z[start : start + size].chunk(2) for z in (x, out))
            channels = min(x_s.shape[1], out_s.shape[1])  # a denoiser that says its variance too has more
            source = out_s[:, :channels] + toward * (x_t[:, :channels] - x_s[:, :channels])
            out_t[:, :channels] = torch.where(mask, out_t[:, :channels], source)
        return out

    def mask(self, call: DenoiserCall, kept: dict[str, Any]) -> Tensor | None:
        """Where the target is its own, boolean ``[P, ...]`` as latents but for channels; None where all of it is.

        A pair without a word that differs is nowhere.
        """
        differ = torch.tensor([bool(there or here) for there, here in self.differing(kept)])
        begun = not self._within(call.step, self.blend_from)
        if not begun and bool(differ.all()):
            return None
        layout, shape = call.step.layout, list(call.latents.shape)
        found = torch.ones(len(differ), 1, 1, 1)
        if begun and kept["maps"] and layout is not None:
            maps = merged(list(kept["maps"].values()), (layout.height, layout.width)).float()
            wide = max_pool2d(maps.flatten(0, 1)[:, None], 3, 1, 1)[:, 0].unflatten(0, maps.shape[:2])
            top = wide.amax((2, 3), keepdim=True)
            found = ((wide > self.threshold * top) & (top > 0)).unflatten(0, (2, -1)).any(0).float()  # [P, F, h, w]
        found = found * differ.to(found.device)[:, None, None, None]
        if len(shape) == 3:  # tokens
            return found.expand(-1, *(layout.frames, layout.height, layout.width)).flatten(1)[..., None] > 0.5  # type: ignore[union-attr]
        if len(shape) == 4:
            return interpolate(found, shape[2:], mode="nearest") > 0.5
        first = layout is not None and shape[2] % layout.frames != 0  # frames before channels
        sized = interpolate(found[:, None], [shape[1] if first else shape[2], *shape[3:]], mode="nearest") > 0.5
        return sized.transpose(1, 2) if first else sized

    def _decouple(self, call: DenoiserCall, kept: dict[str, Any], out: Tensor) -> None:
        """Put the source's own into its unconditional rows of ``out``."""
        step, size = call.step, len(out) // len(call.step.branches)
        at = {
            name: slice(step.rows(name, len(out)).start, step.rows(name, len(out)).start + size // 2)
            for name in step.branches
        }
        if "cond" in at:
            kept["cond"] = step.index, out[at["cond"]].clone()
        if "uncond" not in at:
            return
        index, cond = kept.get("cond", (None, out))
        if index != step.index:
            raise UserError(
                "video_p2p: the pipeline asks for the unconditional prediction before the conditional one, by which "
                "the source is decoupled; give source=guided"
            )
        out[at["uncond"]] = cond if self.source == "unguided" else self._fitted(call, kept, at["uncond"], cond)

    def _fitted(self, call: DenoiserCall, kept: dict[str, Any], rows: slice, cond: Tensor) -> Tensor:
        """The unconditional prediction by the embedding that leads to the path's next latents."""
        given, step = select_batch(call, rows), call.step
        start, g = kept.get("embedding", given.get("encoder_hidden_states")), call.guidance_scale
        if not isinstance(start, Tensor) or g is None or step.index is None:
            raise UserError("video_p2p: the denoiser reads no embedding that could be fitted; give source=unguided")
        if len(self.path) != (step.total or 0) + 1:
            raise UserError(
                f"video_p2p: a path of {len(self.path) - 1} steps for a run of {step.total}; give the pipeline "
                f"num_inference_steps={len(self.path) - 1}"
            )
        before, after = _levels(call)
        a, b = affine(before, after)
        x, aim = given[next(iter(given))], self.path[step.index + 1].to(cond)

        def loss(embedding: Tensor) -> Tensor:
            off = call.predict("fitted", **{**given, "encoder_hidden_states": embedding})
            made = a * x + b * (off + g * (cond - off))
            return (made - aim).square().flatten(1).mean(1)

        done = step.index / (step.total or 1)
        kept["embedding"] = fitted(
            start, loss, rate=self.rate * (1 - done / 2), most=self.fits, enough=1e-5 + 1e-3 * done
        )
        return call.predict("fitted", **{**given, "encoder_hidden_states": kept["embedding"]})


def _part(call: AttentionCall, rows: Tensor) -> AttentionCall:
    """Queries, mask and bias of some rows."""
    return call.replace(q=call.q[rows], mask=of_rows(call.mask, rows), bias=of_rows(call.bias, rows))


def _repeated(x: Tensor, rows: int) -> Tensor:
    """What is of each pair, or of each row, for the frames of each that attend apart."""
    return x.repeat_interleave(rows // len(x), 0)


def _levels(call: DenoiserCall) -> tuple[Prediction, Prediction]:
    """The noise levels that the step at hand goes from and comes to."""
    at = int((call.scheduler.timesteps.double().cpu() - call.step.timestep).abs().argmin())
    return levels(call.scheduler)[at]


def _toward(call: DenoiserCall) -> float:
    """By how much of their difference the target's prediction has to differ from the source's to become it."""
    try:
        a, b = affine(*_levels(call))
    except UserError:
        rule = Prediction.of(call)
        one = torch.ones((), dtype=torch.float64)
        return float(rule.output(0 * one, one / rule.sigma))  # says the clean sample of the source
    return -a / b
