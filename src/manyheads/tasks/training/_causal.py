# SPDX-License-Identifier: Apache-2.0
"""The proof that a decoder sees no future: without it its loss means nothing."""

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...models.decoder import Decoder

__all__ = ["check_causal", "perturb_zero_params"]

_LEAK = 1e-5  # of the largest change that the tokens make to their own predictions; without a leak there is none at all


@torch.no_grad()
def check_causal(model: Decoder, ids: Tensor, name: str) -> None:
    """Change tokens ``ids [B, T]`` from some place on: no prediction before it may change.

    Raises:
        UserError: one does.
    """
    training = model.training
    model.eval()
    before, _ = model(ids)
    for cut in {1, ids.shape[1] // 3, ids.shape[1] - 1}:
        other = ids.clone()
        other[:, cut:] = (other[:, cut:] + 1 + torch.arange(ids.shape[1] - cut, device=ids.device) % 7) % (
            model.config.vocab
        )
        change = (model(other)[0] - before).abs()
        if not bool(change[:, :cut].amax() <= _LEAK * change[:, cut:].amax()):
            raise UserError(
                f"{name} is not causal: tokens from position {cut} on change predictions before it, "
                "so its loss would mean nothing; mend its mixer or leave it out"
            )
    model.train(training)


def perturb_zero_params(model: nn.Module) -> None:
    """Give parameters that start at zero a value, so that a path they close cannot hide a leak."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.5)
