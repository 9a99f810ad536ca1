# SPDX-License-Identifier: Apache-2.0
"""How much the output of attention changes from one sampling step to the next: what there is to save by using it again.

Every attention module is run at every step, as without it, and its output is compared with that of the step before:
the mean square of the change, and of the output itself. :meth:`Redundancy.curves` sums this up for attention within a
frame, over time and to the text; :func:`suggest` reads a range and intervals for ``pab`` off it; :func:`plot` draws
it. This is the analysis that Pyramid Attention Broadcast (arXiv 2408.12588) rests on; no code of it was published.

    measure = manyheads.parse("pab.redundancy")
    with manyheads.use(pipe, measure) as port:
        pipe(prompt)
    print(suggest(measure.curves(port)))

Shapes: whatever a module returns, of a pair the first; one earlier output is kept for each module and branch during a
run. Sums are taken in float32. A step is an evaluation of the denoiser; a solver of second order makes two of a
timestep.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal, Protocol

from torch import Tensor

from ...call import DiffusionStep, Site
from ...errors import UserError
from ...strategy import DenoiserModule, Strategy

__all__ = ["Curve", "Redundancy", "plot", "suggest"]

Kind = Literal["spatial", "temporal", "cross"]
KINDS: tuple[Kind, ...] = ("spatial", "temporal", "cross")
LONGEST = 8  # interval that is ever suggested


class _Port(Protocol):
    """Where a strategy was at work."""

    def kept(self, strategy: Strategy) -> Sequence[tuple[Site, dict[str, Any]]]: ...


@dataclass(frozen=True, slots=True)
class Curve:
    """How much one kind of attention changes over the steps, from the second to the last.

    Attributes:
        kind: ``spatial`` (within a frame, or over all tokens), ``temporal`` or ``cross``.
        modules: attention modules of this kind.
        timesteps: of the later of the two steps compared, as the scheduler counts.
        relative: mean square of the change over that of the output, mean over modules, branches and runs.
        absolute: mean square of the change, likewise.
    """

    kind: Kind
    modules: int
    timesteps: tuple[float, ...]
    relative: tuple[float, ...]
    absolute: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Redundancy(DenoiserModule):
    """Changes of attention outputs between neighbouring steps; nothing is changed."""

    def around_module(self, site: Site, step: DiffusionStep, state: dict[str, Any], compute: Callable[[], Any]) -> Any:
        if step.index is None:
            raise UserError(
                "pab.redundancy has to know the steps of the scheduler: open the pipeline, not its denoiser"
            )
        output = compute()
        kept = state.pop("kept", None)
        kind = step.module_kind(site)
        if kind == "text":
            return output
        tensor: Tensor = output[0] if isinstance(output, (tuple, list)) else output
        if kept is not None and kept[0] == step.run and kept[1] == step.index - 1 and kept[2].shape == tensor.shape:
            change = (tensor.float() - kept[2].float()).pow(2).mean()
            size = tensor.float().pow(2).mean()
            steps = state.setdefault("steps", {})
            steps[step.run, step.index] = kind, step.timestep, change, size
        state["kept"] = (step.run, step.index, tensor)
        if step.total is not None and step.index == step.total - 1:
            del state["kept"]
        return output

    def curves(self, port: _Port) -> list[Curve]:
        """What was measured through ``port``, a curve for each kind of attention that the model has.

        Raises:
            UserError: fewer than two steps were run.
        """
        found: dict[Kind, dict[int, list[tuple[float, float, float]]]] = {}
        sites: dict[Kind, set[int]] = {}
        for site, branches in port.kept(self):
            for state in branches.values():
                for (_, index), (kind, timestep, change, size) in state.get("steps", {}).items():
                    row = float(timestep), float(change), float(size)
                    found.setdefault(kind, {}).setdefault(index, []).append(row)
                    sites.setdefault(kind, set()).add(site.index)
        if not found:
            raise UserError(
                "pab.redundancy compares neighbouring steps: run the pipeline inside `use`, for two steps or more"
            )
        curves = []
        for kind in (kind for kind in KINDS if kind in found):
            steps = [rows for _, rows in sorted(found[kind].items())]
            curves.append(
                Curve(
                    kind, len(sites[kind]), tuple(mean(row[0] for row in rows) for rows in steps),
                    tuple(mean(change / max(size, 1e-20) for _, change, size in rows) for rows in steps),
                    tuple(mean(row[1] for row in rows) for rows in steps),
                )
            )  # fmt: skip
        return curves


def suggest(curves: Sequence[Curve], drift: float = 0.15) -> str:
    """The spec of ``pab`` that the curves speak for.

    The range is the longest run of steps at which no kind changes by more than twice its median over all steps; its
    ends lie halfway to the timesteps next to it. With r the root of a kind's mean relative change in the range, outputs
    used again for n - 1 steps are off by (n - 1) r at most if every step goes the same way, as a share of their size;
    n is the largest for which this stays within ``drift``, at most 8. A starting point: what an error does to the
    result depends on the model, so compare with a run without.

    Args:
        curves: of one model, as :meth:`Redundancy.curves` gives them.
        drift: largest error of an output, as a share of its size.

    Raises:
        UserError: no two steps in a row are calm.
    """
    calm = [
        all(curve.relative[i] <= 2 * median(curve.relative) for curve in curves)
        for i in range(len(curves[0].timesteps))
    ]  # fmt: skip
    runs = [(i, j) for i in range(len(calm)) for j in range(i + 2, len(calm) + 1) if all(calm[i:j])]
    if not runs:
        raise UserError(
            "attention changes at every step as at none beside it; there is no range to use outputs again in"
        )
    first, end = max(runs, key=lambda run: run[1] - run[0])
    times = curves[0].timesteps
    upper = (times[first - 1] + times[first]) / 2 if first else times[0] + (times[0] - times[1]) / 2
    lower = (times[end - 1] + times[end]) / 2 if end < len(times) else times[-1] / 2
    fields = [f"upper={upper:.0f}", f"lower={lower:.0f}"]
    for curve in curves:
        step = math.sqrt(mean(curve.relative[first:end]))
        every = 1 + math.floor(drift / step) if step * (LONGEST - 1) > drift else LONGEST
        fields.append(f"{curve.kind}={every}")
    return f"pab:{','.join(fields)}"


def plot(curves: Sequence[Curve], path: Path | str) -> None:
    """Draw the relative changes over the steps, on a logarithmic axis, to ``path`` (its suffix is the format)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for curve, marker in zip(curves, "os^", strict=False):
        axis.semilogy(curve.timesteps, curve.relative, marker=marker, label=f"{curve.kind} ({curve.modules} modules)")
    axis.invert_xaxis()
    axis.set_xlabel("timestep, from noise to image")
    axis.set_ylabel("relative change of attention outputs")
    axis.legend(frameon=False)
    figure.savefig(path)
