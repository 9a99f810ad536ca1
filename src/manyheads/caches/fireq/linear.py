# SPDX-License-Identifier: Apache-2.0
"""Compute linear layers with INT4 weights and FP8 activations, channels smoothed so that 4 bits are enough.

Oh et al., "FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration", arXiv 2505.20839;
of that paper the linear layers. :mod:`manyheads.attention.int4_fp8` has the formulas: groups of ``group`` input
channels share a scale that is an FP8 number itself, a table of 16 FP8 numbers per group stands for its codes, inputs
are FP8 with a scale per token, sums are float32. Two things keep the loss small:

- per tensor: all weights of a layer are multiplied by a power of two, so that the scales of its groups do not underflow
  in FP8;
- per channel: input channel k of the weight is multiplied by s_k = const / mean_n |W[n, k]| and the input divided by
  it, so that channels that share a scale are alike. The released code has the maximum below as well
  (``smoothing=absmax``); the constants of its Llama-3-8B script are of the size of means.

Differences. The paper folds both factors into the norm or the layer before; here the layer's input is divided by s_k
and its output by the power of two, which are the same numbers, and the model stays as it is. The released code finds
one s for q, k and v together and one for up and gate, as one norm feeds them; here every layer has its own. ``const``
is hand-set there for each model (.0096 and .015 for Llama-3-8B); here it drops out, as the power of two is chosen by
the layer's largest group. The released V scaling (.9) and its optional AWQ search are left out. The factors by rotary
pair that the paper folds into W_q and W_k multiply rows: a row has scales of its own, which take them up, so that they
change nothing here and are the cache's (``fireq``). FP8 queries, the FlashAttention-3 prefill pipeline and the fused
epilogues are not built.

With the cache, as the paper has it: ``use(model, "fireq.linear", "fireq")``. Layers outside the blocks (embeddings,
output head) stay as they are. The port keeps the model's own weights to give them back: it shows accuracy, and saves no
memory; ``benchmarks/fireq_linear.py`` has the kernel's speed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ...attention import int4_fp8
from ...errors import UserError
from ...strategy import LinearCompute

__all__ = ["FireQLinear"]

_SCALES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class FireQLinear(LinearCompute):
    """INT4 weights times FP8 activations in all linear layers of the blocks.

    Attributes:
        group: input channels that share a scale: 32, 64 or 128.
        smoothing: of input channels, ``mean``, ``absmax`` or ``none``.
        scale: of a group, ``fp8`` (paper) or ``bf16`` (released alternative).
        table: what a code stands for, ``fp8`` (paper) or ``exact``, not rounded to FP8.
        activations: ``fp8``, or ``whole`` for the model's own: what the weights alone lose (control).
    """

    group: int = field(default=128, metadata={"help": "input channels that share a scale: 32, 64 or 128"})
    smoothing: Literal["mean", "absmax", "none"] = field(
        default="mean", metadata={"help": "of input channels: mean, absmax or none"}
    )
    scale: Literal["fp8", "bf16"] = field(default="fp8", metadata={"help": "of a group: fp8 (paper) or bf16"})
    table: Literal["fp8", "exact"] = field(
        default="fp8", metadata={"help": "what a code stands for: fp8 (paper), or exact"}
    )
    activations: Literal["fp8", "whole"] = field(
        default="fp8", metadata={"help": "fp8, or whole: the model's own (control)"}
    )

    def __post_init__(self) -> None:
        if self.group not in int4_fp8.GROUPS:
            raise UserError(f"fireq.linear: group is one of {', '.join(map(str, int4_fp8.GROUPS))}, not {self.group}")

    def linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Callable[[Tensor], Tensor]:
        del name
        packed = int4_fp8.encode(
            weight, group=self.group, scale=_SCALES[self.scale], table=self.table, smoothing=self.smoothing
        )
        return partial(self._compute, [packed], bias)

    def _compute(self, held: list[int4_fp8.PackedWeight], bias: Tensor | None, x: Tensor) -> Tensor:
        """``held`` has the packed weight, which follows the inputs from device to device."""
        if held[0].codes.device != x.device:
            held[0] = held[0].to(x.device)
        if self.activations == "fp8":
            return int4_fp8.linear(x, held[0], bias)
        return torch.nn.functional.linear(x, int4_fp8.weight(held[0]).to(x.dtype), bias)
