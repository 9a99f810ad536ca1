# SPDX-License-Identifier: Apache-2.0
"""Attention maps as the models' own eager functions return them: what every lens has to agree with."""

from typing import Any

import torch
from torch import Tensor

from oracles import models


def maps(model: Any, **inputs: Tensor) -> dict[str, list[Tensor]]:
    """``[B, H, T, S]`` of every layer: ``self`` (decoders, encoders of BERT's kind), ``encoder``, ``cross``."""
    with torch.no_grad():
        out = model(**inputs, output_attentions=True)
    if getattr(out, "cross_attentions", None):
        return {
            "encoder": list(out.encoder_attentions), "self": list(out.decoder_attentions),
            "cross": list(out.cross_attentions),
        }  # fmt: skip
    return {"self": list(out.attentions)}


def eager(name: str) -> Any:
    """The same weights as ``models.tiny(name)``, with attention that returns its weights."""
    return models.build(name, attn="eager")
