# SPDX-License-Identifier: Apache-2.0
"""Sharpen attention on long inputs until it is as peaked as at the length that the model was trained on.

Chi, Fan and Rudnicky, "Attention Alignment and Flexible Positional Embeddings Improve Transformer Length
Extrapolation", arXiv 2311.00684. The more keys there are, the flatter softmax becomes, and T5, whose position bias is
one constant beyond 128 tokens, flattens most. All logits, content and bias alike, are divided by a temperature tau < 1,

    softmax((scale * q.k + bias) / tau)

which is attention with q / tau and bias / tau, so that SDPA stays. tau is chosen so that beyond the trained length

    entropy   the mean entropy of the rows                   is what it is at the trained length
    pmax      the mean largest weight of the rows            likewise
    gaussian  entropy, if logits are normal with spread s:   tau = s / sqrt(s^2 + 2 ln(L / L_trained))
    logn      by length alone:                               tau = ln L_trained / ln L
    none      1

The first two are solved by bisection on logits of the model itself, :func:`calibrate`:

    aligned = calibrate(AttentionAlignment(trained=512), model, ids, [1024, 2048], port=manyheads.use)

The closed form of the third is good for s up to 2 or so; that of pmax from extreme values is off by a factor of two
and is not offered. Spelled out, the first two are tables, by length and if wished by layer or head, in the spec.

L is the number of keys that a row may attend to: all of them in an encoder, those up to it in a decoder. So rows within
the trained length stay as they were, and decoding a token gives what reading the whole text gives.

Differs from the paper, whose text we did not have: whether tau belongs to the model, a layer or a head and whether
decoder and cross attention are scaled too is not confirmed (from memory: one tau per length, the encoder's self
attention; that is ``where=encoder``, ``per="model"``), so both are options. ``gaussian`` is our derivation; one tau for
each row by its own number of keys, and lengths between two calibrated ones (linear in ln L; the last tau beyond), are
our choices. Capped logits (Gemma 2) and attention sinks (gpt-oss) are refused.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...call import AttentionCall, Site
from ...calls.visible import keys_seen, real
from ...errors import UserError
from ...strategy import AttentionEdit
from .._mixer import edited
from .calibration import Align, calibrate

__all__ = ["Align", "AttentionAlignment", "calibrate"]

Where = Literal["self", "encoder", "decoder", "cross", "all"]


@dataclass(frozen=True, kw_only=True)
class AttentionAlignment(AttentionEdit):
    """Attention logits over a temperature; acts on models as they are, by ``manyheads.use``, or on a Decoder by `on`.

    Attributes:
        align: what is kept as at the trained length: ``entropy`` and ``pmax`` (calibrated), ``gaussian`` (calibrated:
            the spread), ``logn`` or ``none``.
        trained: keys that a row attended to in training at most; up to so many nothing changes.
        tau: one temperature for every longer row, in place of ``align``.
        where: ``self``, ``encoder`` or ``decoder`` self-attention, ``cross``, or ``all``.
        lengths: ascending numbers of keys that were calibrated.
        taus: their temperatures: one each, or for each of them one per site, or one per site and head.
        spread: standard deviation of the logits: one, or one per site, or one per site and head.
        sites: indices of the attention modules that ``taus`` and ``spread`` go through; none where all share.
    """

    align: Align = field(default="logn", metadata={"help": "entropy, pmax, gaussian (calibrated), logn or none"})
    trained: int = field(default=512, metadata={"help": "keys of the longest row in training, left as it is"})
    tau: float | None = field(default=None, metadata={"help": "one temperature for every longer row; else by align"})
    where: Where = field(default="self", metadata={"help": "self, encoder, decoder, cross or all"})
    lengths: tuple[int, ...] = field(default=(), metadata={"help": "calibrated numbers of keys, as 1024+2048"})
    taus: tuple[float, ...] = field(default=(), metadata={"help": "temperatures by length, site and head, as 0.8+0.7"})
    spread: tuple[float, ...] = field(
        default=(), metadata={"help": "deviation of the logits by site and head, for gaussian"}
    )
    sites: tuple[int, ...] = field(default=(), metadata={"help": "attention modules of a table, as 0+1+2"})

    def __post_init__(self) -> None:
        name = self.slug
        if self.trained < 2:
            raise UserError(f"{name}: trained is a number of keys of at least 2, not {self.trained}")
        if any(x <= 0 for x in (*self.taus, *self.spread, 1.0 if self.tau is None else self.tau)):
            raise UserError(f"{name}: temperatures and spreads are positive")
        if any(b <= a for a, b in zip((self.trained, *self.lengths), self.lengths, strict=False)):
            raise UserError(f"{name}: lengths ascend and are longer than the trained length of {self.trained}")
        rows = max(1, len(self.sites))
        if len(self.taus) % (rows * max(1, len(self.lengths))) or len(self.spread) % rows:
            raise UserError(f"{name}: taus are as many for every one of {len(self.lengths)} lengths and {rows} sites")
        if self.tau is None:
            if self.align in ("entropy", "pmax") and not (self.taus and self.lengths):
                raise UserError(f"{name}: align={self.align} needs lengths and taus: calibrate, or take align=logn")
            if self.align == "gaussian" and not self.spread:
                raise UserError(f"{name}: align=gaussian needs the spread of the logits: calibrate, or take align=logn")

    @classmethod
    def calibrated(
        cls, model: nn.Module, ids: Tensor, lengths: Sequence[int], *, trained: int, align: Align = "entropy",
        where: Where = "self", port: Callable[[nn.Module, AttentionEdit], AbstractContextManager[Any]] = edited,
    ) -> "AttentionAlignment":  # fmt: skip
        """Calibrated on a model that was trained on ``trained`` tokens, see :func:`calibrate`."""
        return calibrate(cls(trained=trained, where=where), model, ids, lengths, align=align, port=port, rounds=4)

    def selects(self, site: Site) -> bool:
        mine = {
            "self": site.kind == "self", "encoder": site.kind == "self" and not site.causal,
            "decoder": site.kind == "self" and site.causal, "cross": site.kind == "cross", "all": True,
        }  # fmt: skip
        return super().selects(site) and mine[self.where] and (not self.sites or site.index in self.sites)

    def temperature(self, site: int, seen: Tensor) -> Tensor:
        """Temperature of rows by the number of keys they see.

        Args:
            site: index of the attention module.
            seen: ``[B or 1, H or 1, T or 1]``.

        Returns:
            float64 of the same shape, with all H where heads differ.
        """
        n = seen.double().clamp(min=self.trained)
        if self.tau is not None:
            return torch.where(n > self.trained, self.tau, 1.0)
        if self.align == "logn":
            return math.log(self.trained) / n.log()
        if self.align == "gaussian":
            s = self._row(self.spread, site, n)[0]
            return s / (s * s + 2 * (n / self.trained).log()).sqrt()
        if self.align == "none":
            return torch.ones_like(n)
        tau = torch.ones_like(n)
        before, at = torch.ones((), dtype=n.dtype, device=n.device), self.trained
        for length, value in zip(self.lengths, self._row(self.taus, site, n, len(self.lengths)), strict=True):
            tau = tau + ((n / at).log() / math.log(length / at)).clamp(0, 1) * (value - before)
            before, at = value, length
        return tau

    def _row(self, table: tuple[float, ...], site: int, like: Tensor, blocks: int = 1) -> Tensor:
        """What ``table`` holds for a site: ``[blocks, 1 or H, 1]``."""
        rows = torch.tensor(table, dtype=like.dtype, device=like.device).view(blocks, max(1, len(self.sites)), -1)
        return rows[:, self.sites.index(site) if self.sites else 0, :, None]

    def edit(self, call: AttentionCall) -> AttentionCall:
        if call.softcap is not None or call.sinks is not None:
            raise UserError(f"{self.slug}: {call.site.name} caps its logits or has sinks; leave it out by layers=...")
        if call.k.shape[2] <= self.trained:
            return call
        heads = max(len(self.taus) // max(1, len(self.lengths)), len(self.spread)) // max(1, len(self.sites))
        if heads > 1 and heads != call.q.shape[1]:
            raise UserError(f"{self.slug}: {call.site.name} has {call.q.shape[1]} heads, {heads} were calibrated")
        tau = self.temperature(call.site.index, keys_seen(call))[..., None]
        tau = tau.to(torch.promote_types(call.q.dtype, torch.float32))
        bias = call.bias
        if bias is not None:  # what stands for "not to be seen" stays as it is
            bias = torch.where(real(bias), bias / tau, bias).to(bias.dtype)
        return call.replace(q=(call.q / tau).to(call.q.dtype), bias=bias)

    def on(self, model: nn.Module) -> AbstractContextManager[nn.Module]:
        """Act on the softmax mixers of a :class:`~manyheads.models.decoder.Decoder` within the block.

        Raises:
            UserError: it has none that this selects.
        """
        return edited(model, self)
