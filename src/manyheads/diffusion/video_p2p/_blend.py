# SPDX-License-Identifier: Apache-2.0
"""The local blend: where words that differ act, and a prediction that is another row's elsewhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d

from ...call import AttentionCall, DenoiserCall, Layout
from ...calls.statistics import WeightedSum
from ...calls.weights import measure
from ...errors import UserError
from .._inversion import affine, levels
from .._maps import grid_of, merged, select_queries, to_grid
from .._prediction import Prediction
from ._pair import repeated

__all__ = ["BlendMaps", "levels_of", "toward"]

Places = Sequence[tuple[list[int], list[int]]]  # of words in source and target of each pair


@dataclass(eq=False)
class BlendMaps:
    """Maps of words, summed over steps: of sources, then of their targets ``[2 P, F, h, w]``, by site."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, call: AttentionCall, layout: Layout, places: Places) -> None:
        """Take the maps of one call, of conditional rows alone."""
        length, joint = call.q.shape[2], call.site.kind == "joint"
        image = layout.image(length) if joint else slice(0, length)
        grid = grid_of(layout, image.stop - image.start, len(call.q))
        if grid is None:
            return
        start = image.stop if joint and not layout.text_first else 0
        features = torch.zeros(2, len(places), call.k.shape[2], device=call.q.device)
        for n, sides in enumerate(places):
            for side, tokens in enumerate(sides):
                features[side, n, [start + token for token in tokens]] = 1.0
        asked = select_queries(call, image)
        found = measure(asked, [WeightedSum(repeated(features.flatten(0, 1), len(call.q))[..., None])])[0]
        maps = to_grid(found.mean(1, keepdim=True), grid)[:, 0, 0]
        name = call.site.name
        self.sums[name] = self.sums[name] + maps if name in self.sums else maps

    def mask(self, layout: Layout, threshold: float) -> Tensor:
        """Where words of the source or the target act, boolean ``[P, F, h, w]``.

        Raises:
            UserError: no site has shown maps of words.
        """
        if not self.sums:
            raise UserError("video_p2p: no attention to text shows where words act; give blend=false")
        maps = merged(list(self.sums.values()), (layout.height, layout.width)).float()
        wide = max_pool2d(maps.flatten(0, 1)[:, None], 3, 1, 1)[:, 0].unflatten(0, maps.shape[:2])
        top = wide.amax((2, 3), keepdim=True)
        inside: Tensor = (wide > threshold * top) & (top > 0)
        either: Tensor = inside.unflatten(0, (2, -1)).any(0)
        return either


def as_latents(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask ``[P, F, h, w]`` in the size of latents, one for all channels; their frames are rows, or axis 2 or 1."""
    found = mask.float()
    if len(shape) == 3:  # tokens
        return mask.flatten(1)[..., None]
    if len(shape) == 4:
        return interpolate(found, list(shape[2:]), mode="nearest") > 0.5
    first = shape[2] % mask.shape[1] != 0 and shape[1] % mask.shape[1] == 0  # frames before channels
    sized = interpolate(found[:, None], [shape[1] if first else shape[2], *shape[3:]], mode="nearest") > 0.5
    return sized.transpose(1, 2) if first else sized


def blended(call: DenoiserCall, out: Tensor, mask: Tensor) -> Tensor:
    """Predictions that lead to the source's latents where ``mask [P, F, h, w]`` is not, in every branch.

    Guidance combines branches by weights that sum to 1, so that what is true of each is true of the guided one.
    """
    x, by, where = call.latents, toward(call), as_latents(mask, call.latents.shape)
    channels = min(x.shape[1], out.shape[1])  # a denoiser that says its variance has more
    made, size = out.clone(), len(out) // len(call.step.branches)
    for start in range(0, len(out), size):
        (x_s, x_t), (out_s, out_t) = (z[start : start + size, :channels].chunk(2) for z in (x, made))
        out_t.copy_(torch.where(where, out_t, out_s + by * (x_t - x_s)))
    return made


def levels_of(call: DenoiserCall) -> tuple[Prediction, Prediction]:
    """The noise levels that the step at hand goes from and comes to.

    Raises:
        UserError: the scheduler's steps are of another kind.
    """
    at = int((call.scheduler.timesteps.double().cpu() - call.step.timestep).abs().argmin())
    return levels(call.scheduler)[at]


def toward(call: DenoiserCall) -> float:
    """By how much of their difference the target's prediction has to differ from the source's to become it.

    At once where the step is known; else so that both say the same clean sample.
    """
    try:
        a, b = affine(*levels_of(call))
    except UserError:
        rule, one = Prediction.of(call), torch.ones((), dtype=torch.float64)
        return float(rule.output(0 * one, one / rule.sigma))
    return -a / b
