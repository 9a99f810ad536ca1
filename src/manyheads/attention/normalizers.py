# SPDX-License-Identifier: Apache-2.0
"""How a row of logits becomes a row of weights: softmax and what has been put in its place, behind one name.

For logits l of a row that sees n keys, T the temperature:

    softmax    exp(l_i / T) / sum_j exp(l_j / T)
    ssmax      softmax(s ln(n) l / T): as peaked at any length (arXiv 2501.19399); s = 1 / ln(L) is the log-n scale of a
               model trained on L keys
    sparsemax  argmin over the simplex of |p - l / T|_2: exact zeros (arXiv 1602.02068), entmax with alpha = 2
    entmax15   entmax with alpha = 1.5
    entmax     p_i = [(alpha - 1) l_i / T - tau]_+ ^ (1 / (alpha - 1)), tau so that they sum to 1 (arXiv 1905.05702)
    topk       softmax over the k greatest logits alone; of equals, those that topk returns
    sigmoid    1 / (1 + n exp(-l_i / T)), no competition (arXiv 2409.04431: bias -ln n)
    relu       relu(l_i / T) / n (arXiv 2309.08586)

Rows of the last two do not sum to 1. All take masked logits, give 0 to what is not seen and to rows that see nothing,
and compute in float32 or wider. The threshold tau of entmax is found without sorting: ``sum_i [z_i - tau]_+ ^ m`` is
convex and falls, so Newton's steps from the left never overshoot; halvings of the bracket beside them bound how many
there are. The gradient is the formula's, where p > 0, ``J = (diag(q) - q q^T / sum q) / T`` with
``q = p ^ (2 - alpha)``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from . import reference

__all__ = ["NORMALIZERS", "Kind", "Normalizer", "entmax", "log_n_scale", "sensitivity"]

Kind = Literal["softmax", "ssmax", "sparsemax", "entmax15", "entmax", "topk", "sigmoid", "relu"]
_ROUNDS = 16  # of a halving and a Newton step; those of a processor end when nothing moves


@dataclass(frozen=True)
class Normalizer:
    """One of :data:`NORMALIZERS` and its settings.

    Attributes:
        kind: which.
        temperature: T, divides the logits.
        alpha: of ``entmax``, above 1 and at most 2.
        k: of ``topk``.
        s: of ``ssmax``.
    """

    kind: Kind = "softmax"
    temperature: float = 1.0
    alpha: float = 1.5
    k: int = 32
    s: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in NORMALIZERS:
            raise UserError(f"{self.kind!r} is no normalizer; there are {', '.join(NORMALIZERS)}")
        if not (self.temperature > 0 and self.s > 0 and self.k >= 1):
            raise UserError(f"{self.kind}: temperature and s are above 0, k is at least 1")
        if not 1 < self.alpha <= 2:
            raise UserError(f"entmax is for alpha above 1 (where it is softmax) and at most 2, not {self.alpha}")

    @property
    def order(self) -> float:
        """Alpha of entmax that it is on the logits that it keeps; softmax and what is made with it have 1."""
        return {"sparsemax": 2.0, "entmax15": 1.5, "entmax": self.alpha}.get(self.kind, 1.0)

    def __call__(self, x: Tensor, mask: Tensor | None = None, s: Tensor | float | None = None) -> Tensor:
        """Weights of logits.

        Args:
            x: ``[..., S]``.
            mask: boolean, broadcastable to ``x``, True = seen; None for all.
            s: in place of the attribute, broadcastable to ``x``: what a model has learned.

        Returns:
            ``[..., S]`` in the dtype of ``x``.
        """
        seen = torch.full_like(x[..., :1], x.shape[-1]) if mask is None else mask.expand(x.shape).sum(-1, keepdim=True)
        wide = reference.widened(x)
        wide = wide if self.temperature == 1 else wide / self.temperature
        if mask is not None:
            wide = wide.masked_fill(~mask, -torch.inf)
        n = seen.to(wide.dtype).clamp(min=1)
        return NORMALIZERS[self.kind](wide, n, self, self.s if s is None else s).to(x.dtype)


Rule = Callable[[Tensor, Tensor, Normalizer, Any], Tensor]  # of logits, keys seen, settings, and the scale


def _ssmax(x: Tensor, n: Tensor, of: Normalizer, s: Any) -> Tensor:
    hidden = x == -torch.inf  # times ln 1 = 0, or in the gradient of s, that is no number
    return reference.softmax((x.masked_fill(hidden, 0.0) * (s * n.log())).masked_fill(hidden, -torch.inf))


def _top_k(x: Tensor, n: Tensor, of: Normalizer, s: Any) -> Tensor:
    top = x.topk(min(of.k, x.shape[-1]), dim=-1)
    return torch.zeros_like(x).scatter(-1, top.indices, reference.softmax(top.values))


NORMALIZERS: dict[str, Rule] = {
    "softmax": lambda x, n, of, s: reference.softmax(x),
    "ssmax": _ssmax,
    "sparsemax": lambda x, n, of, s: entmax(x, 2.0),
    "entmax15": lambda x, n, of, s: entmax(x, 1.5),
    "entmax": lambda x, n, of, s: entmax(x, of.alpha),
    "topk": _top_k,
    "sigmoid": lambda x, n, of, s: torch.sigmoid(x - n.log()),
    "relu": lambda x, n, of, s: torch.relu(x) / n,
}


def entmax(x: Tensor, alpha: float) -> Tensor:
    """Entmax of the last axis, 1 < alpha <= 2; logits of -inf get 0, and so do rows that have no others."""
    made: Tensor = _Entmax.apply(x, alpha)  # type: ignore[no-untyped-call]
    return made


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        top = x.amax(-1, keepdim=True)
        z = (x - top.masked_fill(top == -torch.inf, 0.0)) * (alpha - 1) + 1  # the greatest is 1, tau is in [0, 1)
        power, tiny = 1 / (alpha - 1), torch.finfo(x.dtype).tiny
        low = torch.zeros_like(top)
        high = low + (1 - x.shape[-1] ** (1 - alpha))  # where all are equal

        def at(tau: Tensor) -> tuple[Tensor, Tensor]:
            """The sum less 1 at tau, and how fast it falls."""
            u = (z - tau).clamp(min=0)
            slope = torch.sign(u) if power == 1 else u if power == 2 else u.pow(power - 1)
            return (slope * u).sum(-1, keepdim=True) - 1, (power * slope.sum(-1, keepdim=True)).clamp(min=tiny)

        for _ in range(_ROUNDS):
            before = low
            middle = (low + high) / 2
            above = at(middle)[0] >= 0
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
            excess, slope = at(low)
            low = low + (excess / slope).clamp(min=0)
            if x.device.type == "cpu" and torch.equal(low, before):  # elsewhere nobody waits to ask
                break
        p = (z - low).clamp(min=0).pow(power)
        p = p / p.sum(-1, keepdim=True).clamp(min=tiny)
        ctx.save_for_backward(p)
        ctx.alpha = alpha
        return p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        q = torch.where(p > 0, p.pow(2 - ctx.alpha), 0.0)
        total = q.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        return q * (grad - (q * grad).sum(-1, keepdim=True) / total), None


def sensitivity(p: Tensor, of: Normalizer, n: Tensor) -> Tensor:
    """Frobenius norm of the Jacobian of weights by logits, of each row: of softmax at most 1 / (2 T).

    With ``a = sum p^2`` that of softmax is ``sqrt(a - 2 sum p^3 + a^2) / T``, and as ``sum p^3 >= a^2`` no more than
    ``sqrt(a (1 - a)) / T``. The spectral norm is no greater. (The paper's min(1 / (4 T), sqrt 2) bounds an entry of the
    Jacobian, not its norm: the row (1/2, 1/2) has 1 / (2 T).)

    Args:
        p: weights ``[..., S]`` that ``of`` made.
        of: the normalizer.
        n: keys that each row sees, ``[...]``.
    """
    if of.kind == "sigmoid":
        return (p * (1 - p)).square().sum(-1).sqrt() / of.temperature
    if of.kind == "relu":
        return (p > 0).sum(-1).to(p.dtype).sqrt() / n / of.temperature
    q = p if of.order == 1 else torch.where(p > 0, p.pow(2 - of.order), 0.0)
    q1, q2, q3 = (q.pow(power).sum(-1) for power in (1, 2, 3))
    q1 = q1.clamp(min=torch.finfo(p.dtype).tiny)
    scale = of.s * n.log() if of.kind == "ssmax" else 1.0
    return (q2 - 2 * q3 / q1 + (q2 / q1).square()).clamp(min=0).sqrt() * scale / of.temperature


def log_n_scale(length: int) -> float:
    """The s of ``ssmax`` with which rows of ``length`` keys, those of training, stay as they are."""
    return 1 / math.log(max(2, length))
