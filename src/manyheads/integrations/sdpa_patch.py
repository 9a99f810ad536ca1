# SPDX-License-Identifier: Apache-2.0
"""The patch of SDPA, and how one attention computation of a denoiser goes through the strategies of its site."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from diffusers.models import attention_dispatch
from torch import Tensor

from ..attention.causal import for_gradient_of
from ..attention.reference import causal_mask
from ..call import AttentionCall, Axis, DiffusionStep, Layout, Site
from ..errors import UserError
from ..strategy import DenoiserModule
from .hook_chain import BoundStrategy, HookChain

__all__ = ["OpenPort", "SiteState", "sdpa_patch"]


class OpenPort(Protocol):
    """An open port: it knows which attention modules run in this thread, the innermost last."""

    def stack(self) -> "list[SiteState]": ...


class _SDPAPatch:
    """The wrappers of SDPA and of diffusers' backends, put in place with the first open port, gone with the last."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.ports: list[OpenPort] = []
        self.sdpa: Callable[..., Tensor] | None = None
        self.backends: dict[Any, Callable[..., Tensor]] = {}

    def open(self, port: OpenPort) -> None:
        with self.lock:
            if not self.ports:
                self._install()
            self.ports.append(port)

    def close(self, port: OpenPort) -> None:
        with self.lock:
            self.ports.remove(port)
            if not self.ports:
                torch.nn.functional.scaled_dot_product_attention = cast("Any", self.sdpa)
                registry = attention_dispatch._AttentionBackendRegistry._backends
                registry.update(self.backends)
                self.sdpa, self.backends = None, {}

    def _install(self) -> None:
        original = self.sdpa = torch.nn.functional.scaled_dot_product_attention

        def sdpa(
            query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
            is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
        ) -> Tensor:  # fmt: skip
            state = self._top()
            plain: dict[str, Any] = {"dropout_p": dropout_p, "enable_gqa": enable_gqa}
            if state is None:
                return original(query, key, value, attn_mask, is_causal=is_causal, scale=scale, **plain)

            def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, factor: float | None) -> Tensor:
                return original(q, k, v, mask, is_causal=causal, scale=factor, **plain)

            return state.run(query, key, value, attn_mask, is_causal, scale, dropout_p, run)

        torch.nn.functional.scaled_dot_product_attention = cast("Any", sdpa)
        registry = attention_dispatch._AttentionBackendRegistry._backends
        for name, backend in list(registry.items()):
            self.backends[name] = backend
            registry[name] = self._backend(backend)

    def _backend(self, backend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A backend of diffusers, ``[B, T, H, d]`` throughout; one that calls SDPA itself is left to SDPA's wrapper."""
        if "native" in getattr(backend, "__name__", ""):
            return backend

        def call(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            state = self._top()
            if state is None or args:
                return backend(query, key, value, *args, **kwargs)
            mask, causal, scale = (
                kwargs.pop(n, d) for n, d in (("attn_mask", None), ("is_causal", False), ("scale", None))
            )

            def run(q: Tensor, k: Tensor, v: Tensor, m: Tensor | None, c: bool, factor: float | None) -> Tensor:
                turned = (x.transpose(1, 2) for x in (q, k, v))
                given = {"attn_mask": m, "is_causal": c, "scale": factor}
                known = {n: x for n, x in given.items() if n in _names(backend)}
                return backend(*turned, **known, **kwargs).transpose(1, 2)

            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return state.run(q, k, v, mask, causal, scale, kwargs.get("dropout_p", 0.0), run).transpose(1, 2)

        return call

    def _top(self) -> "SiteState | None":
        """The state of the attention module that is running in this thread, None outside of one."""
        for port in reversed(self.ports):
            stack = port.stack()
            if stack and not stack[-1].running:
                return stack[-1]
        return None


def _names(backend: Callable[..., Tensor]) -> set[str]:
    """Names of the arguments of an attention backend."""
    code = getattr(backend, "__code__", None)
    return set() if code is None else set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


sdpa_patch = _SDPAPatch()


class SiteState(HookChain):
    """What the open ports keep on one attention module: its strategies, and what it was called with."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site, self.ports, self.running = site, 0, False
        self.hidden: Tensor | None = None
        self.text: Tensor | None = None
        self.step: DiffusionStep | None = None
        self.last: Site | None = None  # with its kind, as the latest call showed it
        self.axis: Axis = "all"
        self.key = ""  # of what is kept for the rows at hand
        self.parts: int | None = None  # computations so far, of a processor that perturbs attention by itself

    def enter(self, hidden: Tensor | None, text: Tensor | None, processor: str) -> None:
        """Take note of what the module is called with, and the class of its processor."""
        self.hidden, self.text = hidden, text
        self.parts = 0 if processor.startswith("PAG") else None

    def located(self, q: Tensor, k: Tensor) -> tuple[Site, DiffusionStep | None]:
        """The site with its kind as this call shows it, and the step with the axis along which tokens attend."""
        step, length, size = self.step, q.shape[2], k.shape[2]
        layout: Layout | None = None if step is None else step.layout
        kind = self.site.kind
        if kind != "joint":
            if self.text is not None:
                own = None if self.hidden is None or self.hidden.ndim != 3 else self.hidden.shape[1]
                kind = "joint" if own is not None and length > own else "cross"
            elif layout is not None and layout.text and length == layout.tokens + layout.text and length == size:
                kind = "joint"
            else:
                kind = "self"
        if step is not None and layout is not None and kind == "self" and step.axis == "all":  # not known already
            frame = layout.height * layout.width
            axis: Axis = "all"
            if length == frame and q.shape[0] % layout.frames == 0 and layout.frames > 1:
                axis = "space"
            elif length == layout.frames and q.shape[0] % frame == 0 and layout.frames > 1:
                axis = "time"
            elif length != layout.tokens and layout.grid(length) is None:
                axis = "text"
            step = replace(step, axis=axis)
        return (self.site if kind == self.site.kind else replace(self.site, kind=kind)), step

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float,
        attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor],
    ) -> Tensor:  # fmt: skip
        """One computation ``[B, H, T, d]`` through the strategies of the site: ``[B, H, T, dv]``.

        SDPA calls of the strategies themselves do not go through the port again.
        """
        self.running = True
        try:
            return self._run(q, k, v, mask, causal, scale, dropout, attention)
        finally:
            self.running = False

    def _run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float,
        attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, bool, float | None], Tensor],
    ) -> Tensor:  # fmt: skip
        site, step = self.located(q, k)
        if step is not None and self.parts is not None and len(step.branches) > 1 and step.branches[-1] == "perturbed":
            step = replace(step, branches=step.branches[:-1] if self.parts == 0 else ("perturbed",))
            self.parts += 1
        self.last, self.axis, self.key = site, "all" if step is None else step.axis, "" if step is None else step.key
        if not self.has_hooks:
            return attention(q, k, v, mask, causal, scale)
        boolean = mask is not None and mask.dtype == torch.bool
        allowed = mask if boolean else None
        if causal and q.shape[2] != k.shape[2]:  # SDPA anchors at the top left
            allowed, causal = causal_mask(q.shape[2], q.shape[2], q.device)[None, None, :, : k.shape[2]], False
        original = call = AttentionCall(
            site=site, q=q, k=k, v=v, scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale, mask=allowed,
            bias=None if boolean else mask, is_causal=causal, dropout=dropout, diffusion=step,
        )  # fmt: skip
        acting = [entry for entry in self.entries if self.state_of(entry) is not None]
        for entry in acting:
            entry.called = True
        attending = [strategy.spec for entry, strategy in self._attenders if entry in acting]
        if len(attending) > 1:
            names = " and ".join(attending[:2])
            raise UserError(f"{names} cannot hold together: each computes the output of {site.name}")
        call = self.edit(call)
        out = self.attend(call)
        if out is None:
            unchanged = call is original
            out = (
                attention(q, k, v, mask, causal, scale).transpose(1, 2) if unchanged else self._changed(call, attention)
            )
        return self.after(call, out).transpose(1, 2)

    def state_of(self, entry: BoundStrategy) -> dict[str, Any] | None:
        """What a strategy that selects the site as it showed itself keeps for the branches at hand."""
        if self.last is None or not entry.strategy.selects(self.last):
            return None
        kept: dict[str, Any] = entry.state.setdefault(self.key, {})
        return kept

    def wrap_module(
        self, inner: Callable[..., Any], entry: BoundStrategy, strategy: DenoiserModule
    ) -> Callable[..., Any]:
        """A module's forward as ``strategy``, that of ``entry``, has it.

        The kind of site is known once its attention has run; until then it is read from the module's attributes.
        """

        def forward(*args: Any, **kwargs: Any) -> Any:
            site = self.last or self.site
            if self.step is None or not strategy.selects(site):
                return inner(*args, **kwargs)
            entry.called = True
            state = entry.state.setdefault(self.step.key, {})
            step = self.step if self.step.axis == self.axis else replace(self.step, axis=self.axis)
            return strategy.around_module(site, step, state, lambda: inner(*args, **kwargs))

        return forward

    @staticmethod
    def _changed(call: AttentionCall, attention: Callable[..., Tensor]) -> Tensor:
        """The backend's own attention on a call that was changed, ``[B, T, H, dv]``."""
        mask, causal = call.mask, call.is_causal
        if call.bias is not None:
            allowed = call.allowed()
            floor = torch.finfo(call.q.dtype).min
            mask, causal = call.bias if allowed is None else torch.where(allowed, call.bias, floor), False
        elif causal and mask is not None:
            mask, causal = call.allowed(), False
        q = for_gradient_of(mask, call.q, call.k, call.v)
        return attention(q, call.k, call.v, mask, causal, call.scale).transpose(1, 2)
