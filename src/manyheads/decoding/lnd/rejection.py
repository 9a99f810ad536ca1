# SPDX-License-Identifier: Apache-2.0
"""Top-k, nucleus and temperature normalised over whole texts, exactly: draw from the model, keep what the cut allows.

A text is drawn token by token from the model itself and given up at the first token that the cut leaves out or, below a
temperature of 1, that a coin of ``p^(1/temperature - 1)`` decides against. The first that comes through has exactly the
law of its weight among all texts. It takes ``1 / A`` texts, which grow exponentially with the length.

Local Normalization Distortion and the Thermodynamic Formalism of Decoding Strategies (arXiv 2503.21929). The released
code draws whole texts and looks at them afterwards; giving one up early changes nothing but the time.
"""

from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...errors import UserError
from ...writing import DecodingLoop, ModelAccess, Request, Written
from .._cut import Cut

__all__ = ["GlobalRejection"]


@dataclass(frozen=True, kw_only=True)
class GlobalRejection(Cut, DecodingLoop):
    """Draw a whole text by its weight among all texts that the cut keeps: exactly, or not at all."""

    batch: int = field(default=32, metadata={"help": "texts that are drawn side by side"})
    tries: int = field(default=2048, metadata={"help": "texts that are drawn before it gives up"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature > 1:
            raise UserError(f"temperature={self.temperature}: nothing can be rejected above 1; take lnd")
        if not 1 <= self.batch <= self.tries:
            raise UserError(
                f"batch={self.batch}, tries={self.tries}: 1 or more are drawn at once, and no more than tries"
            )

    def write(self, request: Request, access: ModelAccess) -> Written:
        generator, forwards, tried = request.generator(), 0, 0
        while tried < self.tries:
            fresh = replace(request, cache=deepcopy(request.cache))
            accepted, steps = self.accepted(fresh, access, self.batch, generator)
            tried, forwards = tried + self.batch, forwards + steps
            if len(accepted):
                own = accepted[0]
                tokens = [token for token in own[own >= 0].tolist() if token not in request.ends]
                return Written(tokens, forwards, {"tried": tried, "accepted": len(accepted)})
        raise UserError(
            f"{self.spec}: none of {tried} texts of up to {request.most} tokens stayed within the cut; write fewer "
            "tokens, cut less, or take lnd, which needs no luck"
        )

    def accepted(
        self, request: Request, access: ModelAccess, count: int, generator: torch.Generator
    ) -> tuple[Tensor, int]:
        """Texts ``[K, T]`` of ``count`` drawn that come through, in the order in which they were begun, and forwards.

        ``-1`` stands behind the end of a text. The request's cache is changed.
        """
        request.cache.batch_select_indices(torch.zeros(count, dtype=torch.long, device=request.ids.device))
        read, fed = access.reader(request.cache), request.ids[:, -1:].expand(count, 1)
        tokens, alive = fed[:, :0], torch.ones(count, dtype=torch.bool, device=fed.device)
        ended = ~alive
        ends = torch.tensor(sorted(request.ends), device=fed.device, dtype=torch.long)
        steps = 0
        with torch.inference_mode():
            while steps < request.most and bool((alive & ~ended).any()):
                logits = read(fed)
                steps += 1
                likely = logits.log_softmax(-1)
                fed = torch.multinomial(likely.exp(), 1, generator=generator)
                stays = (self.log_weights(logits) - likely).gather(1, fed)[:, 0]
                coin = torch.rand(count, generator=generator, device=fed.device)
                alive = alive & (ended | (coin.log() < stays))
                tokens = torch.cat([tokens, fed.masked_fill(ended[:, None], -1)], 1)
                ended = ended | torch.isin(fed[:, 0], ends)
        return tokens[alive], steps
