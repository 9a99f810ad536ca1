# SPDX-License-Identifier: Apache-2.0
"""Decoupled guidance: the source's unconditional rows are its own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...call import DenoiserCall
from ...errors import UserError
from .._inversion import affine, fitted
from .._prediction import select_batch
from ._blend import levels_of

__all__ = ["decoupled"]


def decoupled(call: DenoiserCall, out: Tensor, kept: dict[str, Any], fit: Mapping[str, Any] | None) -> Tensor:
    """Predictions whose unconditional rows of sources lead them to where they came from.

    Args:
        call: of pairs.
        out: its prediction.
        kept: scratch of the run.
        fit: path, most and rate of an embedding that is fitted; None to guide the source not at all.

    Raises:
        UserError: the unconditional prediction is asked for before the conditional one.
    """
    step, made = call.step, out.clone()
    half = len(out) // len(step.branches) // 2
    starts = {name: step.rows(name, len(out)).start for name in step.branches}
    if "cond" in starts:
        kept["cond"] = step.index, out[starts["cond"] : starts["cond"] + half].clone()
    if "uncond" in starts:
        index, cond = kept.get("cond", (None, out))
        if index != step.index:
            raise UserError(
                "video_p2p: the pipeline asks for the unconditional prediction before the conditional one, by which "
                "the source is decoupled; give source=guided"
            )
        rows = slice(starts["uncond"], starts["uncond"] + half)
        made[rows] = cond if fit is None else _by_embedding(call, rows, cond, kept, **fit)
    return made


def _by_embedding(
    call: DenoiserCall, rows: slice, cond: Tensor, kept: dict[str, Any], path: Tensor, most: int, rate: float
) -> Tensor:  # fmt: skip
    """The unconditional prediction by the embedding whose guided step leads to the next latents of a path.

    It begins where the one of the step before came to, the first at the pipeline's own. The rate falls to a half over
    the run, and what is enough of a mean squared error rises from 1e-5 by 1e-3, as the released code has it at 50
    steps.
    """
    given, step, g = select_batch(call, rows), call.step, call.guidance_scale
    own = given.get("encoder_hidden_states")
    if not isinstance(own, Tensor) or g is None or step.index is None or not step.total:
        raise UserError("video_p2p: the denoiser reads no embedding that could be fitted; give source=unguided")
    if len(path) != step.total + 1:
        raise UserError(
            f"video_p2p: a path of {len(path) - 1} steps for a run of {step.total}; give the pipeline "
            f"num_inference_steps={len(path) - 1}"
        )
    a, b = affine(*levels_of(call))
    x, aim = call.latents[rows], path[step.index + 1].to(cond)

    def predicted(embedding: Tensor) -> Tensor:
        return call.predict("fitted", **{**given, "encoder_hidden_states": embedding})

    def loss(embedding: Tensor) -> Tensor:
        off = predicted(embedding)
        return (a * x + b * (off + g * (cond - off)) - aim).square().flatten(1).mean(1)

    done = step.index / step.total
    kept["embedding"] = fitted(
        kept.get("embedding", own), loss, rate=rate * (1 - done / 2), most=most, enough=1e-5 + 1e-3 * done
    )
    return predicted(kept["embedding"])
