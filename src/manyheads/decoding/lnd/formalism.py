# SPDX-License-Identifier: Apache-2.0
"""Thermodynamics of decoding where nothing has to be estimated: a chain of finitely many states.

A table ``log_w [S, V]`` says how heavy each of V tokens is after each of S states, minus infinity where it is cut, and
``after [S, V]`` which state follows. The weights of all texts of n tokens sum to A_n, and ``log A_n / n`` tends to
the pressure, the logarithm of the leading eigenvalue of the transfer operator
``(L h)(s) = sum_v w(s, v) h(after(s, v))``. The law of whole texts in that limit is the equilibrium state, itself a
chain: ``w(s, v) h(after(s, v)) / (lambda h(s))``. Among all stationary laws on that support it alone maximises entropy
plus mean ``log w``, with the pressure as maximum.

Local Normalization Distortion and the Thermodynamic Formalism of Decoding Strategies (arXiv 2503.21929).
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ...errors import UserError

__all__ = ["Chain", "Law"]

_MOST, _CLOSE = 10_000, 1e-13  # rounds of the power iteration, and the relative change at which it ends


@dataclass(frozen=True, slots=True)
class Law:
    """A law of texts, by its figures per token in nats.

    Attributes:
        entropy: of the next token given all before.
        energy: mean negative log-likelihood by the model.
        mass: mean of the mass Z that contexts keep.
        log_mass: mean of ``log Z``: minus the distortion of local normalisation.
    """

    entropy: float
    energy: float
    mass: float
    log_mass: float


@dataclass(frozen=True)
class Chain:
    """Weights of the next token after each of finitely many states.

    Attributes:
        log_w: ``[S, V]`` in float64.
        after: state that follows ``[S, V]``, int64.
    """

    log_w: Tensor
    after: Tensor

    def __post_init__(self) -> None:
        if self.log_w.shape != self.after.shape or not bool((self.log_w > -torch.inf).any(1).all()):
            raise UserError("a chain has a next state for every weight, and after every state a token that may come")

    @property
    def local(self) -> Tensor:
        """Log-probabilities ``[S, V]`` of plain sampling: each state's weights over their sum."""
        return self.log_w.log_softmax(1)

    def log_sums(self, steps: int) -> Tensor:
        """``log A_n`` of the texts of n tokens from each state, n from 0 to ``steps``: ``[steps + 1, S]``."""
        found = [self.log_w.new_zeros(len(self.log_w))]
        for _ in range(steps):
            found.append((self.log_w + found[-1][self.after]).logsumexp(1))
        return torch.stack(found)

    def whole(self, steps: int) -> Tensor:
        """Log-probabilities of each token of a text of ``steps``, by weight among whole texts: ``[steps, S, V]``."""
        sums = self.log_sums(steps)
        return torch.stack([
            self.log_w + sums[steps - t - 1][self.after] - sums[steps - t][:, None] for t in range(steps)
        ])  # fmt: skip

    def equilibrium(self) -> tuple[float, Tensor]:
        """Pressure in nats per token, and log-probabilities ``[S, V]`` of the equilibrium state.

        Raises:
            UserError: the power iteration does not settle, as in a chain that falls apart or runs in a circle.
        """
        h, pressure = self.log_w.new_zeros(len(self.log_w)), 0.0
        for _ in range(_MOST):
            # Half of the identity beside the operator: the same eigenvectors, and no circle.
            grown = torch.logaddexp((self.log_w + h[self.after]).logsumexp(1), h)
            rise = grown - h
            h = grown - grown.max()
            pressure = float(rise.exp().sub(1).clamp(min=1e-300).log().mean())
            if float(rise.max() - rise.min()) < _CLOSE:
                return pressure, (self.log_w + h[self.after]).log_softmax(1)
        raise UserError("the chain has no single equilibrium state: some states cannot be reached from others")

    def stationary(self, log_q: Tensor) -> Tensor:
        """Share of the time ``[S]`` that a chain of log-probabilities ``log_q [S, V]`` is in each state."""
        q, share = log_q.exp(), self.log_w.new_full((len(self.log_w),), 1 / len(self.log_w))
        for _ in range(_MOST):
            flow = torch.zeros_like(share).index_add_(0, self.after.flatten(), (share[:, None] * q).flatten())
            flow = (flow + share) / 2
            if float((flow - share).abs().sum()) < _CLOSE:
                return flow
            share = flow
        raise UserError("the chain does not settle: it mixes too slowly")

    def law(self, log_q: Tensor, log_p: Tensor) -> Law:
        """Figures of the stationary law of ``log_q [S, V]``, energies by the model's ``log_p [S, V]``."""
        return self._law(self.stationary(log_q), log_q, log_p)

    def texts(self, log_q: Tensor, log_p: Tensor, start: Tensor) -> Law:
        """Figures of texts that ``log_q [T, S, V]`` writes from states of shares ``start [S]``: means over T tokens."""
        share, laws = start, []
        for own in log_q:
            laws.append(self._law(share, own, log_p))
            flow = (share[:, None] * own.exp()).flatten()
            share = torch.zeros_like(share).index_add_(0, self.after.flatten(), flow)
        return Law(*(sum(x) / len(laws) for x in zip(*map(astuple, laws), strict=True)))

    def _law(self, share: Tensor, log_q: Tensor, log_p: Tensor) -> Law:
        joint, log_mass = share[:, None] * log_q.exp(), self.log_w.logsumexp(1)
        return Law(
            entropy=-float((joint * log_q.masked_fill(joint == 0, 0.0)).sum()),
            energy=-float((joint * log_p.masked_fill(joint == 0, 0.0)).sum()),
            mass=float((share * log_mass.exp()).sum()), log_mass=float((share * log_mass).sum()),
        )  # fmt: skip
