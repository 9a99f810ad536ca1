# SPDX-License-Identifier: Apache-2.0
"""Dynamic tanh (DyT) in place of norms, a mitigation of massive activations (paper 104, 2503.22329; DyT 2503.10622).

    DyT(x) = gamma * tanh(alpha x) + beta,   elementwise, alpha one number, gamma and beta one for each channel.

A norm divides by the size of its input, so that one huge entry silences all others; tanh bounds every entry by itself,
and nothing is gained from a huge one. For training from scratch: a trained model does not survive the exchange.

    with_dyt(model)                    # in place; then train
    model.load_state_dict(weights)     # of such a model: after with_dyt on a new one

alpha starts at 1.0 in blocks and at 0.5 in the final norm; the token embedding is multiplied by a learned number that
starts at sqrt(D), since nothing brings it to size any more. Every module whose class ends in RMSNorm or LayerNorm and
has a weight of one dimension is exchanged, norms of queries and keys too. What stands in no list of modules is final.
"""

import re
from typing import cast

import torch
from torch import Tensor, nn

from ...errors import UserError
from .tvr import blocks_of

__all__ = ["DyT", "ScaledEmbedding", "with_dyt"]

_NORM = re.compile(r"(RMS|Layer)Norm$")


class DyT(nn.Module):
    """``weight * tanh(alpha * x) + bias`` over the last of ``[..., channels]``."""

    def __init__(self, channels: int, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), alpha))
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.tanh(self.alpha * x) + self.bias


class ScaledEmbedding(nn.Embedding):
    """``table`` times one learned number, at first sqrt(D); its weight stays the same parameter, so that ties hold."""

    def __init__(self, table: nn.Embedding) -> None:
        weight = cast("nn.Parameter", table.weight)
        super().__init__(table.num_embeddings, table.embedding_dim, table.padding_idx, _weight=weight)
        self.weight = weight
        self.scale = nn.Parameter(weight.new_full((1,), table.embedding_dim**0.5))

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.scale


def with_dyt(
    model: nn.Module, *, alpha: float = 1.0, final_alpha: float = 0.5, scale_embedding: bool = True
) -> list[str]:  # fmt: skip
    """Exchange the norms of a new model, in place.

    Args:
        model: a transformers model (LlamaRMSNorm, Qwen3RMSNorm, nn.LayerNorm, ...), untrained.
        alpha: of norms in blocks; final_alpha: of those outside.
        scale_embedding: multiply the token embedding, see :class:`ScaledEmbedding`.

    Returns:
        Names of the modules exchanged.

    Raises:
        UserError: the model has no norm that is known, or no token embedding.
    """
    inside, exchanged = {module for block in blocks_of(model) for module in block.modules()}, []
    for name, norm in list(model.named_modules()):
        weight = getattr(norm, "weight", None)
        if _NORM.search(type(norm).__name__) and isinstance(weight, nn.Parameter) and weight.ndim == 1:
            made = DyT(len(weight), alpha if norm in inside else final_alpha).to(weight.device, weight.dtype)
            model.set_submodule(name, made.train(model.training))
            exchanged.append(name)
    if not exchanged:
        raise UserError(f"{type(model).__name__} has no RMSNorm or LayerNorm with a weight to be replaced by DyT")
    if scale_embedding:
        table = getattr(model, "get_input_embeddings", lambda: None)()
        if not isinstance(table, nn.Embedding):
            raise UserError(f"{type(model).__name__} has no token embedding to scale: pass scale_embedding=False")
        name = next(name for name, module in model.named_modules() if module is table)
        model.set_submodule(name, ScaledEmbedding(table).train(model.training))
    return exchanged
