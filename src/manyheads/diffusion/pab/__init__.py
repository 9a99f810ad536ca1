# SPDX-License-Identifier: Apache-2.0
"""Pyramid Attention Broadcast: in the middle of sampling, what attention returned some steps ago is used again.

The outputs of an attention module at neighbouring steps differ much at the first and last steps of sampling and little
in between, and least for cross-attention, more for attention over time, most for attention within a frame. So inside a
range of timesteps a module is run at every n-th step only, with n growing in that order (the pyramid), and its output
of the last run is used at the others. Nothing of the module is computed then: no projections, no attention.

Real-Time Video Generation with Pyramid Attention Broadcast (arXiv 2408.12588).

Shapes: whatever the module returns is kept as it is, a tensor ``[B, T, D]`` or a pair of them.

Differences. The released code keeps, in some models, the output after the gate of the block, so that norm, modulation
and gate of the old step are used again; here, as in diffusers, it is the module's own output, and the new step's gate
applies. Steps are evaluations of the denoiser, counted from the beginning of the run: at step c a module inside the
range is run where c is a multiple of n, and where nothing is kept yet; a solver of second order makes two of a
timestep. Diffusers (0.42) counts the calls of each module instead, so that where conditional and unconditional
predictions are separate calls each is given the other's output; here every branch has its own. What is kept is given up
at the end of the range, when a new run begins, and when the batch changes. Broadcasting the outputs of feed-forward
layers, which the released code does in a few blocks, is left out: it is no attention.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...call import DiffusionStep, Site
from ...errors import UserError
from ...strategy import DenoiserModule
from .redundancy import Curve, Redundancy, plot, suggest

__all__ = ["PAB", "Curve", "Redundancy", "plot", "suggest"]


def _first(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return tensor


@dataclass(frozen=True, kw_only=True)
class PAB(DenoiserModule):
    """Attention outputs used again for some steps.

    Attributes:
        spatial, temporal, cross: a module is run at every n-th step of the range: attention within a frame (or over all
            tokens), over time, and to the text; 1 for always.
        upper, lower: timesteps of the range, both exclusive, on the scheduler's scale of 1,000.
    """

    spatial: int = field(default=2, metadata={"help": "attention within a frame, or over all tokens: every n-th step"})
    temporal: int = field(default=4, metadata={"help": "attention over time: every n-th step"})
    cross: int = field(default=6, metadata={"help": "attention to the text: every n-th step"})
    upper: float = field(default=930.0, metadata={"help": "reuse below this timestep (of 1,000)"})
    lower: float = field(default=450.0, metadata={"help": "and above this one"})

    def __post_init__(self) -> None:
        if min(self.spatial, self.temporal, self.cross) < 1:
            raise UserError("pab: every n-th step, n at least 1; 1 runs a module at every step")
        if not self.lower < self.upper:
            raise UserError(
                f"pab: the range from {self.upper} down to {self.lower} is empty; lower must be below upper"
            )

    def every(self, site: Site, step: DiffusionStep) -> int:
        """How many steps apart a module of this kind is run."""
        kind = step.module_kind(site)
        return {"spatial": self.spatial, "temporal": self.temporal, "cross": self.cross, "text": 1}[kind]

    def around_module(self, site: Site, step: DiffusionStep, state: dict[str, Any], compute: Callable[[], Any]) -> Any:
        if step.index is None:
            raise UserError("pab has to know the steps of the scheduler: open the pipeline, not its denoiser")
        counts = state.setdefault("counts", {"computed": 0, "reused": 0, "bytes": 0})
        inside = self.lower < step.timestep < self.upper
        kept = state.pop("kept", None)
        if inside and kept is not None and kept[0] == step.run and step.index % self.every(site, step) != 0:
            state["kept"] = kept
            counts["reused"] += 1
            return kept[1]
        output = compute()
        counts["computed"] += 1
        if inside and self.every(site, step) > 1:
            state["kept"] = (step.run, output)
            counts["bytes"] = max(counts["bytes"], _first(output).nbytes)
        return output
