# SPDX-License-Identifier: Apache-2.0
"""Interventions on the outputs of heads: at a prompt's last token they are replaced by those of another forward.

What stands before the last token of a causal model does not change with it. So a prompt's beginning is read once, and
of every forward with an intervention only the last token is computed, for many heads in one batch:

    runs = PatchedRuns(model, manyheads.use, padded(model, tokenizer, prompts))
    other = PatchedRuns(model, manyheads.use, padded(model, tokenizer, counterfactual)).outputs
    logits = runs.each_head(other)                      # [N, V] for each head of each site, one patched at a time
    logits = runs.logits(other, gates)                  # all heads, as far as their gates are open

A head's output is ``z [B, T, H, dv]``, before the output projection, whatever the architecture (grouped queries, fused
projections). With a gate g in 0..1 it becomes ``(1 - g) z + g z'``, z as it is in the forward at hand. Prompts may have
other lengths than those that they are patched from: only last tokens are exchanged. ``use`` is :func:`manyheads.use`,
by which the model is entered. Sizes: N prompts, H heads, D channels, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..call import AttentionCall, Site
from ..errors import UserError
from ..lens import device_of
from ..strategy import AttentionPatch, AttentionWatch, Layers, Residual

__all__ = ["Inputs", "KeepOutputs", "Outputs", "PatchHeads", "PatchedRuns", "ShiftResidual", "frozen", "padded"]

Inputs = Mapping[str, Tensor]
Outputs = dict[str, Tensor]  # by the name of a site

_ROWS = {"cpu": 192, "cuda": 2048}  # of a batch with interventions


def padded(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask [N, T]`` of texts, padded on the left, on the device of ``model``.

    Raises:
        UserError: a text has fewer than two tokens.
    """
    rows = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, rows))
    if min(map(len, rows)) < 2:
        raise UserError("a prompt has two tokens at least: one to be patched, and one before it")
    device = device_of(model)
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of the weights of ``model``; as they were afterwards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class KeepOutputs(AttentionWatch):
    """Keeps what every head gives at the last token, ``[B, H, dv]``."""

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        call.state["z"] = out[:, -1].detach()


@dataclass(frozen=True, kw_only=True)
class PatchHeads(AttentionPatch):
    """Outputs of heads, replaced as far as their gates are open, at the last token or at all of them.

    Attributes:
        other: for each site that is patched, z' ``[B, H, dv]`` of the last token, or ``[B, T, H, dv]`` of all.
        gates: for each of these, ``[B or 1, H]`` in 0..1.
    """

    other: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    gates: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.name in self.gates

    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        z, name = out[:, -1], call.site.name
        gate, other = self.gates[name].to(z.dtype)[..., None], self.other[name].to(z.dtype)
        if other.ndim == out.ndim:
            return (1 - gate[:, None]) * out + gate[:, None] * other
        mixed = (1 - gate) * z + gate * other
        return torch.cat([out[:, :-1], mixed[:, None]], 1)


@dataclass(frozen=True, kw_only=True)
class ShiftResidual(Residual):
    """The residual stream at the last token behind the last block, shifted by ``by [B, D]``; ``state`` keeps it."""

    by: Tensor | None = field(default=None, compare=False)
    state: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def selects(self, site: Site) -> bool:
        return super().selects(site) and bool(site.peers) and site.layer == site.peers[-1]

    def residual(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor:
        if self.by is not None:
            hidden = torch.cat([hidden[:, :-1], (hidden[:, -1] + self.by.to(hidden.dtype))[:, None]], 1)
        self.state["hidden"] = hidden[:, -1]
        return hidden


class PatchedRuns:
    """Forwards of the same prompts with one intervention or another at their last tokens.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        use: :func:`manyheads.use`.
        inputs: of :func:`padded`.
        layers: where heads are patched, None for all.

    Attributes:
        sites: of these layers.
        outputs: z of every site at the last token, ``[N, H, dv]``.
        plain: logits at the last token, float32 ``[N, V]``.
    """

    def __init__(self, model: nn.Module, use: Callable[..., Any], inputs: Inputs, layers: Layers = None) -> None:
        self.model, self._use, self._mask = model, use, inputs["attention_mask"]
        self._last, ids = inputs["input_ids"][:, -1:], inputs["input_ids"][:, :-1]
        self._takes = set(inspect.signature(model.forward).parameters)
        keep = KeepOutputs(layers=layers)
        with torch.no_grad():
            self._past = self._forward(ids, self._mask[:, :-1], None).past_key_values
            with use(model, keep) as port:
                self.plain = self._read(1)
            self.sites: list[Site] = [site for site, _ in port.kept(keep)]
            self.outputs: Outputs = {site.name: state["z"] for site, state in port.kept(keep)}

    def __len__(self) -> int:
        return len(self._last)

    @property
    def length(self) -> int:
        """Tokens of the longest prompt."""
        return self._mask.shape[1]

    def logits(self, other: Outputs, gates: Outputs, *also: Residual) -> Tensor:
        """Logits at the last token, float32 ``[N, V]``, with gradients where ``gates`` have them.

        Args:
            other: z' of the sites, ``[N, H, dv]``, or ``[1, H, dv]`` for all.
            gates: ``[N or 1, H]`` of the sites that are patched.
            also: acts on the residual stream in the same forward.
        """
        patches = [PatchHeads(other=other, gates=gates)] if gates else []
        with self._use(self.model, *patches, *also):
            return self._read(1)

    def each_head(self, other: Outputs) -> Iterator[tuple[Site, int, Tensor]]:
        """Site, head and logits ``[N, V]`` of a forward in which that head alone is patched, for every head."""
        count, rows = len(self), _ROWS.get(self._last.device.type, 192)
        most = max(1, rows // count)
        with torch.no_grad():
            for site in self.sites:
                heads = self.outputs[site.name].shape[1]
                for start in range(0, heads, most):
                    part = torch.eye(heads, device=self._last.device)[start : start + most]
                    z = other[site.name].expand(count, -1, -1).repeat_interleave(len(part), 0)
                    patch = PatchHeads(other={site.name: z}, gates={site.name: part.repeat(count, 1)})
                    with self._use(self.model, patch):
                        found = self._read(len(part)).unflatten(0, (count, len(part)))
                    yield from ((site, start + i, found[:, i]) for i in range(len(part)))

    def _read(self, times: int) -> Tensor:
        """Logits ``[N * times, V]`` of the last tokens; the cache of what stands before is copied, not changed."""
        past = copy.deepcopy(self._past)
        if times > 1:
            past.batch_repeat_interleave(times)
        mask, last = (x.repeat_interleave(times, 0) for x in (self._mask, self._last))
        logits: Tensor = self._forward(last, mask, past).logits[:, -1]
        return logits.float() if logits.dtype != torch.float64 else logits

    def _forward(self, ids: Tensor, mask: Tensor, past: Any) -> Any:
        """A forward of tokens ``ids`` at the end of ``mask``."""
        given: dict[str, Any] = {"input_ids": ids, "past_key_values": past, "use_cache": True}
        if not bool(mask.all()):
            given["attention_mask"] = mask
            if "position_ids" in self._takes:
                given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        return self.model(**given)
