# SPDX-License-Identifier: Apache-2.0
"""Top-k, nucleus and temperature normalised over whole texts, by sequential Monte Carlo.

Each text is one of ``particles`` that grow side by side by plain sampling. After each token a particle's weight is
multiplied by the mass Z that its context keeps, before the next token is drawn; when the effective number falls below
``resample`` of them, they are drawn again by weight (systematically), and the last draw is by weight too. The mean
weight is an unbiased estimate of A, the share of all texts that the cut keeps. With ``resample=0`` this is importance
resampling; with one particle it is plain sampling. As particles grow many the law is that of whole texts; with few it
lies between that and plain sampling's.

Local Normalization Distortion and the Thermodynamic Formalism of Decoding Strategies (arXiv 2503.21929), which samples
by rejection; the particles are ours.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...writing import BatchedLoop, ModelAccess, Request, Written
from .._cut import Cut

__all__ = ["GlobalSampling", "Particles"]


@dataclass(frozen=True, slots=True)
class Particles:
    """Texts that grew side by side in groups ``[G]``, N in each.

    Attributes:
        tokens: ``[G, N, T]``; -1 behind the end of a text. The token that ended it is among them.
        log_p: of each text by the model, nats ``[G, N]``.
        log_mass: sum of ``log Z`` over its contexts ``[G, N]``: minus the logarithm of its distortion.
        log_weight: at the end ``[G, N]``; its exponentials sum to 1 in a group.
        log_share: estimate of ``log A`` ``[G]``.
        resampled: how often, over all groups.
        forwards: of the model.
    """

    tokens: Tensor
    log_p: Tensor
    log_mass: Tensor
    log_weight: Tensor
    log_share: Tensor
    resampled: int
    forwards: int

    @property
    def effective(self) -> Tensor:
        """Effective number of particles at the end, ``[G]``."""
        return 1 / self.log_weight.exp().pow(2).sum(1)


@dataclass(frozen=True, kw_only=True)
class GlobalSampling(Cut, BatchedLoop):
    """Draw a whole text by its weight among all texts that the cut keeps."""

    particles: int = field(default=16, metadata={"help": "texts that grow side by side for each that is drawn"})
    resample: float = field(
        default=0.5, metadata={"help": "draw particles again when so few of them count; 0 for never"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.particles < 1 or not 0 <= self.resample <= 1:
            raise UserError(
                f"particles={self.particles}, resample={self.resample}: particles are 1 or more, resample in [0, 1]"
            )

    def write_each(self, request: Request, access: ModelAccess, copies: int = 1) -> list[list[Written]]:
        generator = request.generator()
        with torch.inference_mode():
            found = self.grow(request, access, copies, generator)
            chosen = torch.multinomial(found.log_weight.exp(), 1, generator=generator)  # [G, 1]
        effective = found.effective.tolist()
        texts = []
        for group, place in enumerate(chosen[:, 0].tolist()):
            own = found.tokens[group, place]
            tokens = [token for token in own[own >= 0].tolist() if token not in request.ends]
            notes: dict[str, Any] = {
                "particles": self.particles, "effective": effective[group], "log_share": float(found.log_share[group]),
                "log_distortion": -float(found.log_mass[group, place]), "log_p": float(found.log_p[group, place]),
            }  # fmt: skip
            texts.append(Written(tokens, found.forwards, notes))
        return [texts[at : at + copies] for at in range(0, len(texts), copies)]

    def grow(self, request: Request, access: ModelAccess, copies: int, generator: torch.Generator) -> Particles:
        """Particles in ``P * copies`` groups, after the prompts ``[P, T]`` of a request whose cache has read them."""
        groups, count = len(request.ids) * copies, self.particles
        rows = torch.arange(len(request.ids), device=request.ids.device).repeat_interleave(copies * count)
        cache, read = request.cache, access.reader(request.cache)
        cache.batch_select_indices(rows)
        fed = request.ids[rows, -1:]
        weight, share = (torch.zeros(shape, device=fed.device) for shape in ((groups, count), (groups,)))
        # What a particle is: its text, log p, log mass, and whether it has ended.
        state = [fed.new_empty(len(rows), 0), fed.new_zeros(len(rows)).float(), fed.new_zeros(len(rows)).float()]
        ended, resampled, forwards = torch.zeros_like(fed[:, 0], dtype=torch.bool), 0, 0
        ends = torch.tensor(sorted(request.ends), device=fed.device, dtype=torch.long)
        while forwards < request.most and not bool(ended.all()):
            logits = read(fed)
            forwards += 1
            heavy = self.log_weights(logits)
            mass = heavy.logsumexp(-1).masked_fill(ended, 0.0)
            weight = weight + mass.view(groups, count)
            state[2] = state[2] + mass
            low = 1 / weight.softmax(1).pow(2).sum(1) < self.resample * count
            if bool(low.any()):
                resampled += int(low.sum())
                share = share + torch.where(low, weight.logsumexp(1) - torch.tensor(count).log(), 0.0)
                taken = _ancestors(weight, low, generator).flatten()
                weight = weight.masked_fill(low[:, None], 0.0)
                cache.batch_select_indices(taken)
                state, ended, heavy, logits = [x[taken] for x in state], ended[taken], heavy[taken], logits[taken]
            drawn = torch.multinomial(heavy.softmax(-1), 1, generator=generator)
            likely = logits.gather(1, drawn)[:, 0] - logits.logsumexp(-1)
            state[0] = torch.cat([state[0], drawn.masked_fill(ended[:, None], -1)], 1)
            state[1] = state[1] + likely.masked_fill(ended, 0.0)
            ended, fed = ended | torch.isin(drawn[:, 0], ends), drawn
        share = share + weight.logsumexp(1) - torch.tensor(count).log()
        tokens, likely, mass = (x.view(groups, count, *x.shape[1:]) for x in state)
        return Particles(tokens, likely, mass, weight.log_softmax(1), share, resampled, forwards)


def _ancestors(weight: Tensor, low: Tensor, generator: torch.Generator) -> Tensor:
    """Rows ``[G, N]`` that particles go on from: by ``weight [G, N]`` in groups that are ``low [G]``, else themselves.

    Systematic: one draw a group, and a particle of share s has ``N s`` descendants, rounded down or up.
    """
    groups, count = weight.shape
    start = torch.rand(groups, 1, generator=generator, device=weight.device)
    places = (torch.arange(count, device=weight.device) + start) / count
    edges = weight.softmax(1).double().cumsum(1)
    taken = torch.searchsorted(edges, places.double() * edges[:, -1:], right=True).clamp(max=count - 1)
    own = torch.arange(count, device=weight.device).expand_as(taken)
    return torch.where(low[:, None], taken, own) + count * torch.arange(groups, device=weight.device)[:, None]
