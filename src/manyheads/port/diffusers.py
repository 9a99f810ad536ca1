# SPDX-License-Identifier: Apache-2.0
"""The port of diffusers: attention of a denoiser, seen where torch's SDPA is called on its behalf.

Every attention module puts its site on a stack while it runs; while a port is open, torch's SDPA and diffusers' other
attention backends are wrapped, and look at the top of that stack. So queries, keys and values are those after norms and
rotary positions, and no processor of any model has to be rewritten. What step it is and which rows are which branch is
read from the scheduler and the pipeline, never counted, and memory is kept for each branch apart.

Outside an attention module of an open port nothing is changed, and with the last port all wrappers are gone.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self, cast

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, MochiAttention
from torch import Tensor, nn

from ..call import Denoising, Diffusion, Site
from ..errors import UserError
from ..strategy import Strategy, overrides
from .chain import Entry
from .intercept import SiteState, interception
from .layouts import arguments, branches_of, guidance_of, layout_of, step_of

__all__ = ["DiffusersPort", "denoisers", "find_sites"]

_DENOISERS = ("transformer", "transformer_2", "unet", "prior")
_METHODS = ("edit", "attend", "watch", "patch", "reuse", "denoise")
_KINDS = (Attention, MochiAttention, AttentionModuleMixin)
_STATE = "_manyheads"


def denoisers(target: Any) -> list[tuple[str, nn.Module]]:
    """The denoisers of a pipeline with the names of its components, or the model itself under an empty name."""
    if isinstance(target, nn.Module):
        return [("", target)]
    parts = getattr(target, "components", {})
    return [(name, parts[name]) for name in _DENOISERS if isinstance(parts.get(name), nn.Module)]


def find_sites(target: Any) -> list[tuple[Site, nn.Module]]:
    """Attention modules of the denoisers of a pipeline, or of a bare denoiser, in the order of the model.

    The kind is what the module's own attributes say; in a joint sequence that a block puts together by itself it shows
    only when the module runs, and a call's site has it right. ``layer`` numbers the blocks.
    """
    found: list[tuple[Site, nn.Module]] = []
    for prefix, model in denoisers(target):
        blocks: dict[str, int] = {}
        for name, module in model.named_modules():
            known: Any = module
            if not isinstance(module, _KINDS):
                continue
            path = f"{prefix}.{name}" if prefix in _DENOISERS[1:2] else name
            layer = blocks.setdefault(name.rpartition(".")[0], len(blocks))
            heads = getattr(module, "heads", None) or getattr(module, "num_heads", None)
            kind: Literal["self", "cross", "joint"] = "self"
            if getattr(module, "added_kv_proj_dim", None) is not None:
                kind = "joint"
            elif getattr(module, "is_cross_attention", False):
                kind = "cross"
            found.append((Site(path, len(found), layer, kind, False, heads, heads), known))
    peers = tuple(sorted({site.layer for site, _ in found if site.layer is not None}))
    return [(replace(site, peers=peers), module) for site, module in found]


def _acts(strategy: Strategy) -> bool:
    """Whether a strategy acts at attention modules, not only on the denoiser as a whole."""
    return any(overrides(strategy, method) for method in _METHODS if method != "denoise")


def _choose(target: Any, strategy: Strategy, sites: list[tuple[Site, nn.Module]]) -> set[int]:
    """Sites that a strategy may act at: those it selects as any kind, since a joint sequence shows only later."""
    if not any(overrides(strategy, method) for method in _METHODS):
        raise UserError(f"{strategy.slug} does not act on the attention of a denoiser: `manyheads list --wing guides`")
    if overrides(strategy, "store"):
        raise UserError(f"{strategy.slug} keeps a cache of keys and values, and a denoiser has none")
    at = {
        site.index
        for site, _ in sites
        if any(strategy.selects(replace(site, kind=kind)) for kind in {site.kind, "self", "cross", "joint"})
    }
    if not at:
        raise UserError(
            f"{strategy.spec} finds no attention to act on in {type(target).__name__}: it has {len(sites)} "
            f"sites in layers 0 to {max(site.layer or 0 for site, _ in sites)}"
        )
    return at


def replace_forward(
    module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Put ``around(forward)`` in place of a module's forward; the returned function undoes it."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = around(module.forward)

    def undo() -> None:
        del module.__dict__["forward"]
        if own is not None:
            module.__dict__["forward"] = own

    return undo


def repacked(output: Any, sample: Tensor) -> Any:
    """A denoiser's output with another sample in it: a tuple, or one of diffusers' output classes."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(**{**output, "sample": sample})


class DiffusersPort:
    """An open or closed way into the denoisers of a pipeline; made by :func:`manyheads.use`, opened by ``with``."""

    def __init__(self, target: Any, strategies: tuple[Strategy, ...]) -> None:
        self.target, self.strategies = target, strategies
        self._entries: list[tuple[SiteState, Entry]] = []
        self._undo: list[Callable[[], None]] = []
        self._local = threading.local()
        self._branch: str | None = None
        self._timesteps: Any = None
        self._run = 0
        self._board: dict[str, Any] = {}
        self._asked: dict[str, Any] = {}

    def stack(self) -> list[SiteState]:
        """The attention modules of this port that run in this thread, the innermost last."""
        if torch.compiler.is_compiling():  # tracing is in one thread, and compiled code asks no more
            return self._traced
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[SiteState] = self._local.stack
        return stack

    def __enter__(self) -> Self:
        if self._undo:
            raise RuntimeError("this port is open already; call manyheads.use again for a nested one")
        sites = find_sites(self.target)
        if not sites:
            raise UserError(
                f"{type(self.target).__name__} has no attention that the port of diffusers can enter; give a pipeline "
                "with a transformer or a unet, or such a model"
            )
        chosen = [_choose(self.target, strategy, sites) for strategy in self.strategies]
        self._traced: list[SiteState] = []
        self._entries = []
        try:
            interception.open(self)
            self._undo.append(lambda: interception.close(self))
            for site, module in sites:
                self._attach(
                    site, module, [s for s, at in zip(self.strategies, chosen, strict=True) if site.index in at]
                )
            for _, model in denoisers(self.target):
                self._watch_denoiser(model)
            if not isinstance(self.target, nn.Module):
                self._undo.append(self._hear_call())
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None:
            for state, entry in self._entries:
                if not entry.called and entry.strategy.selects(state.last or state.site):
                    raise UserError(
                        f"{entry.strategy.spec} selected {state.site.name}, and its attention was never seen: the "
                        "model did not run it in the block, or by a processor without SDPA (sliced, xformers)"
                    )

    def _restore(self) -> None:
        while self._undo:
            self._undo.pop()()

    def memory(self, strategy: Strategy) -> dict[str, dict[str, Any]]:
        """What ``strategy`` kept, by site name and then by branch; readable after closing too."""
        return {site.name: memory for site, memory in self.kept(strategy)}

    def kept(self, strategy: Strategy) -> list[tuple[Site, dict[str, Any]]]:
        """The same with the sites themselves, of the kind they showed, in the order of the model."""
        return [(state.last or state.site, e.memory) for state, e in self._entries if e.strategy is strategy]

    def _attach(self, site: Site, module: nn.Module, strategies: list[Strategy]) -> None:
        state: SiteState | None = module.__dict__.get(_STATE)
        if state is None:
            state = module.__dict__[_STATE] = SiteState(site)
        state.ports += 1
        entries = [Entry(self, strategy) for strategy in strategies]
        state.add(entries)
        self._entries += [(state, entry) for entry in entries]

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, *kwargs.values()]
            state.hidden = next((x for x in given if isinstance(x, Tensor)), None)
            text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            state.text = text if isinstance(text, Tensor) else None
            self.stack().append(state)

        def leave(*_: Any) -> None:
            self.stack().pop()
            state.hidden = state.text = None

        handles = [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ]

        def undo() -> None:
            for handle in handles:
                handle.remove()
            state.remove(self)
            state.ports -= 1
            if state.ports == 0:
                del module.__dict__[_STATE]

        self._undo.append(undo)
        for entry in entries:
            if overrides(entry.strategy, "reuse"):
                self._undo.append(replace_forward(module, lambda inner, e=entry: state.reusing(inner, e)))  # type: ignore[misc]

    def _watch_denoiser(self, model: nn.Module) -> None:
        """Read step, branch and layout off the denoiser's inputs, before it runs."""
        states = [state for state, _ in self._entries]

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if torch.compiler.is_compiling():
                return
            now = self._now(module, arguments(module, args, kwargs))
            for state in states:
                state.now = now

        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        self._undo.append(handle.remove)
        for strategy in self.strategies:
            if overrides(strategy, "denoise"):
                self._undo.append(replace_forward(model, self._denoising(model, strategy)))
        if hasattr(type(model), "cache_context"):
            self._undo.append(self._name_branches(model))

    def _denoising(self, model: Any, strategy: Strategy) -> Callable[..., Callable[..., Any]]:
        """The forward of a denoiser as ``strategy`` has it; the forward before it is what ``predict`` calls."""
        states = [state for state, _ in self._entries]

        def around(inner: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = arguments(model, args, kwargs)
                now = next((state.now for state in states if state.now is not None), None) or self._now(model, given)
                made: list[Any] = []

                def run(branch: str = "", **changes: Any) -> Tensor:
                    seen = replace(now, branches=(branch,)) if branch else now
                    for state in states:
                        state.now = seen
                    try:
                        made.append(inner(**{**given, **changes}))
                    finally:
                        for state in states:
                            state.now = now
                    first: Tensor = made[-1][0]
                    return first

                pipe = None if isinstance(self.target, nn.Module) else self.target
                scale = guidance_of(pipe, self._asked)
                call = Denoising(now, given, getattr(pipe, "scheduler", None), scale, run)
                out = strategy.denoise(call)
                for _, entry in self._entries:
                    entry.called = entry.called or (entry.strategy is strategy and not _acts(strategy))
                return repacked(made[0], out)

            return forward

        return around

    def _hear_call(self) -> Callable[[], None]:
        """Hear with which arguments the pipeline is called, by a subclass of its own class while the port is open."""
        pipe, kind = self.target, type(self.target)

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            before, self._asked = self._asked, arguments(this, args, kwargs, kind.__call__)
            try:
                return kind.__call__(this, *args, **kwargs)
            finally:
                self._asked = before

        pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})

        def undo() -> None:
            pipe.__class__ = kind

        return undo

    def _name_branches(self, model: Any) -> Callable[[], None]:
        """Listen to the names of the contexts in which a pipeline runs its denoiser."""
        original = model.cache_context
        own = model.__dict__.get("cache_context")

        @contextmanager
        def context(name: str, **kwargs: Any) -> Any:
            before, self._branch = self._branch, name
            try:
                with cast("AbstractContextManager[Any]", original(name, **kwargs)):
                    yield
            finally:
                self._branch = before

        model.__dict__["cache_context"] = context

        def undo() -> None:
            del model.__dict__["cache_context"]
            if own is not None:
                model.__dict__["cache_context"] = own

        return undo

    def _now(self, module: nn.Module, given: dict[str, Any]) -> Diffusion:
        pipe = None if isinstance(self.target, nn.Module) else self.target
        timestep = given.get("timestep")
        value = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep or 0)
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is not None and timesteps is not self._timesteps:  # the scheduler was given new ones
            self._timesteps, self._run, self._board = timesteps, self._run + 1, {}
        index, total = step_of(module, value, scheduler)
        rows = next(x.shape[0] for x in given.values() if isinstance(x, Tensor) and x.ndim > 1)
        guided = guidance_of(pipe, self._asked) is not None
        branches = branches_of(pipe, self._branch, rows, guided)
        return Diffusion(
            self._run, index, total, value, branches, layout_of(module, given), board=self._board
        )  # fmt: skip
