# SPDX-License-Identifier: Apache-2.0
"""Text embeddings of a decoder: which mask, and which pooling, over the last layer or over all of them.

The last token of a causal model has seen the whole text, and its last state was trained to say what comes next. Other
layers, and other tokens once the mask is taken away, may say more of what the text is about; a small network that is
trained with the model finds it. Five designs, beside which the plain mean stands as well:

Pooling And Attention: What Are Effective Designs For LLM-Based Embedding Models? (arXiv 2409.02727).

    1   mask=causal,pooling=eos                 the last state of the end-of-text token
    2   mask=causal,pooling=last_layer          latents attend to that state
    3   mask=causal,pooling=layers              latents attend to the last token of every layer
    4   mask=bidirectional,pooling=last_layer   latents attend to all tokens of the last layer
    5   mask=bidirectional,pooling=layers       latents attend to the mean over tokens of every layer

    x = Z + O MHA(Q LN(Z), K u, V u)     u = LN(h) + W     Z [M, D] latents; W [L, D] of layers, of all layers only
    y = x + GEGLU(LN(x))                 the vector is the mean of y over the M latents, brought to length 1

Trained by InfoNCE over cosines (scale 20) with hard negatives, adapters of rank 16 in all linear layers.

The released code has 768 latents and 32 heads of 2,048 channels whatever the model, a billion parameters beside half a
billion of the smallest one; here heads have D channels in all and there are 64 latents. It lets latents attend to
padding (4), takes what stands last in the tensor, padding or not (2, 3), and takes the token that pads for padding even
where it is part of a text (5); none of that here. Chosen here: V and O begin as the identity, latents small and the
last layer of GEGLU as zero, so that all designs begin as a mean of normalised states and little training tells.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..calls.calibration import Statistics
from ..conversion import Anatomy, EncoderConversion, EncoderDesign, SurgeryPlan, bidirectional
from ..errors import UserError
from ._poolers import Pooler, attend, last, mean

__all__ = ["LatentPooler", "Pooling"]


@dataclass(frozen=True, kw_only=True)
class Pooling(EncoderConversion):
    """See the head of this file."""

    families: ClassVar[frozenset[str]] = frozenset({"llama", "gemma", "gpt2"})

    mask: str = field(default="bidirectional", metadata={"help": "bidirectional or causal"})
    pooling: str = field(default="layers", metadata={"help": "eos, mean, last_layer or layers (trained, both)"})
    latents: int = field(default=64, metadata={"help": "queries of trained pooling"})
    heads: int = field(default=8, metadata={"help": "of its attention"})
    mult: int = field(default=4, metadata={"help": "neurons of its feed-forward part, in widths of the model"})

    def __post_init__(self) -> None:
        if self.mask not in ("bidirectional", "causal") or self.pooling not in ("eos", "mean", "last_layer", "layers"):
            raise UserError("mask is bidirectional or causal, and pooling is eos, mean, last_layer or layers")
        if min(self.latents, self.heads, self.mult) < 1:
            raise UserError("latents, heads and mult are 1 or more")

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        return SurgeryPlan((bidirectional(model),) if self.mask == "bidirectional" else ())

    def design(self, model: Anatomy) -> EncoderDesign:
        if self.pooling in ("eos", "mean"):
            name = "Ends" if self.pooling == "eos" else "Mean"
            return EncoderDesign(
                pooler=f"manyheads.convert._poolers:{name}", eos=self.pooling == "eos", normalize=True
            )  # fmt: skip
        if model.width % self.heads:
            fits = max(n for n in range(1, self.heads) if model.width % n == 0)
            raise UserError(f"{self.heads} heads do not divide {model.width} channels; take heads={fits}")
        config = {
            "width": model.width, "layers": len(model.layers) if self.pooling == "layers" else 0,
            "causal": self.mask == "causal", "latents": self.latents, "heads": self.heads, "mult": self.mult,
        }  # fmt: skip
        eos = self.mask == "causal"
        return EncoderDesign(pooler=f"{__name__}:LatentPooler", config=config, eos=eos, normalize=True)


class LatentPooler(Pooler):
    """Cross-attention of latents, see the head of this file.

    Args:
        width: D.
        layers: L; 0 for the last layer alone.
        causal: of each layer the last token is read, not all or their mean.
        latents: M.
        heads: of D / heads channels.
        mult: neurons of GEGLU over D.
    """

    def __init__(self, width: int, layers: int, causal: bool, latents: int, heads: int, mult: int) -> None:
        super().__init__()
        self.all_layers, self.causal, self.heads = layers > 0, causal, heads
        self.latents = nn.Parameter(torch.randn(latents, width) * 0.02)
        self.layer = nn.Parameter(torch.zeros(layers, width)) if layers else None
        self.norm_q, self.norm_kv, self.norm_x = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * mult * width), nn.Linear(mult * width, width)
        for part in (self.v, self.o):
            nn.init.eye_(part.weight)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        seen = None
        if self.layer is not None:  # of hidden states the first are the embeddings
            own = states[:, 1:]
            tokens = last(own, mask) if self.causal else mean(own, mask[:, None])
        elif self.causal:
            tokens = last(states, mask)[:, None]
        else:
            tokens, seen = states.masked_fill(~mask[..., None], 0), mask
        u = self.norm_kv(tokens)
        if self.layer is not None:
            u = u + self.layer
        z = self.latents.expand(len(states), -1, -1)
        x = z + self.o(attend(self.q(self.norm_q(z)), self.k(u), self.v(u), self.heads, seen))
        value, gate = self.up(self.norm_x(x)).chunk(2, -1)
        y: Tensor = x + self.down(value * nn.functional.gelu(gate))
        return y.mean(1)
