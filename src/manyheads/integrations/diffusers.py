# SPDX-License-Identifier: Apache-2.0
"""The port of diffusers: attention of a denoiser, seen where torch's SDPA is called on its behalf.

Every attention module puts its site on a stack while it runs; while a port is open, torch's SDPA and diffusers' other
attention backends are wrapped, and look at the top of that stack. So queries, keys and values are those after norms and
rotary positions, and no processor of any model has to be rewritten. What step it is and which rows are which branch is
read from the scheduler and the pipeline or its guider, never counted, and state is kept for each branch apart.

Outside an attention module of an open port nothing is changed, and with the last port all wrappers are gone.
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal, Self

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.attention_processor import MochiAttention
from torch import Tensor, nn

from ..call import Axis, DenoiserCall, Layout, Site
from ..errors import UserError
from ..strategy import Attention, Cache, Denoiser, DenoiserModule, DenoiserPrediction, Strategy
from .hook_chain import BoundStrategy
from .layouts import arguments
from .pipeline_state import PipelineObserver, Restore, patch_attr
from .sdpa_patch import SiteState, sdpa_patch

__all__ = ["DiffusersPort", "denoisers", "find_sites", "is_open", "set_layout"]

_DENOISERS = ("transformer", "transformer_2", "unet", "prior")
_KINDS = (DiffusersAttention, MochiAttention, AttentionModuleMixin)
_STATE = "_manyheads"
_GUIDED = frozenset({"cond", "uncond", "all"})


def denoisers(target: Any) -> list[tuple[str, nn.Module]]:
    """The denoisers of a pipeline with the names of its components, or the model itself under an empty name."""
    if isinstance(target, nn.Module):
        return [("", target)]
    parts = getattr(target, "components", {})
    return [(name, parts[name]) for name in _DENOISERS if isinstance(parts.get(name), nn.Module)]


def find_sites(target: Any) -> list[tuple[Site, nn.Module]]:
    """Attention modules of the denoisers of a pipeline, or of a bare denoiser, in the order of the model.

    The kind is read from the module's own attributes; in a joint sequence that a block puts together by itself it shows
    only when the module runs, and a call's site has it right. ``layer`` numbers the blocks.
    """
    found: list[tuple[Site, nn.Module]] = []
    for prefix, model in denoisers(target):
        blocks: dict[str, int] = {}
        for name, module in sorted(model.named_modules(), key=_order):
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


def _order(named: tuple[str, nn.Module]) -> int:
    """In which third of a UNet a module runs; its class defines the middle last. Elsewhere modules run as defined."""
    return {"mid_block": 1, "up_blocks": 2}.get(named[0].partition(".")[0], 0)


def _acts(strategy: Strategy) -> bool:
    """Whether a strategy acts at attention modules, not only on the denoiser as a whole."""
    return isinstance(strategy, (Attention, DenoiserModule))


def _choose(target: Any, strategy: Strategy, sites: list[tuple[Site, nn.Module]]) -> set[int]:
    """Sites that a strategy may act at: those it selects as any kind, since a joint sequence shows only later."""
    if not isinstance(strategy, (Attention, Denoiser)):
        raise UserError(
            f"{strategy.slug} does not act on the attention of a denoiser: `manyheads list --category diffusion`"
        )
    if isinstance(strategy, Cache):
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


def _plan(target: Any, strategies: tuple[Strategy, ...]) -> list[tuple[Site, nn.Module, list[Strategy]]]:
    """Every site of ``target`` with the strategies that may act there."""
    sites = find_sites(target)
    if not sites:
        raise UserError(
            f"{type(target).__name__} has no attention that the port of diffusers can enter; give a pipeline with a "
            "transformer or a unet, or such a model"
        )
    chosen = [_choose(target, strategy, sites) for strategy in strategies]
    return [
        (site, module, [s for s, at in zip(strategies, chosen, strict=True) if site.index in at])
        for site, module in sites
    ]


def replace_forward(module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Restore:
    """Put ``around(forward)`` in place of a module's forward; the returned function restores it."""
    return patch_attr(module, "forward", around(module.forward))


def is_open(model: nn.Module) -> bool:
    """Whether a port is open on a denoiser."""
    return any(_STATE in module.__dict__ for module in model.modules())


def set_layout(module: nn.Module, layout: Layout, axis: Axis) -> None:
    """Set for the open ports of an attention module which tokens it works on in this call, if not all of the inputs'.

    Args:
        module: an attention module of a denoiser whose call has begun.
        layout: of the tokens it works on.
        axis: along which they attend to each other.
    """
    state: SiteState | None = module.__dict__.get(_STATE)
    if state is not None and state.step is not None:
        state.step = replace(state.step, layout=layout, axis=axis)


def repacked(output: Any, sample: Tensor) -> Any:
    """A denoiser's output with another sample in it: a tuple, or one of diffusers' output classes."""
    if isinstance(output, tuple):
        return (sample, *output[1:])
    return type(output)(**{**output, "sample": sample})


class DiffusersPort:
    """An open or closed way into the denoisers of a pipeline; made by :func:`manyheads.use`, opened by ``with``."""

    def __init__(self, target: Any, strategies: tuple[Strategy, ...], observer: PipelineObserver | None = None) -> None:
        """The port of ``target``.

        Args:
            target: a pipeline or a denoiser.
            strategies: to act through it.
            observer: of the pipeline, where another object keeps it; then state lasts when the port is opened again.
        """
        self.target, self.strategies = target, strategies
        self.observer = observer or PipelineObserver(None if isinstance(target, nn.Module) else target)
        self._lasting = observer is not None
        self._plan: list[tuple[Site, nn.Module, list[Strategy]]] = []
        self._planned: Any = self._plan
        self._entries: list[tuple[SiteState, BoundStrategy]] = []
        self._held: dict[tuple[int, int], tuple[SiteState, BoundStrategy]] = {}
        self._restorers: list[Restore] = []
        self._local = threading.local()

    def stack(self) -> list[SiteState]:
        """The attention modules of this port that run in this thread, the innermost last."""
        if torch.compiler.is_compiling():  # tracing is in one thread, and compiled code asks no more
            return self._traced
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        stack: list[SiteState] = self._local.stack
        return stack

    def __enter__(self) -> Self:
        if self._restorers:
            raise RuntimeError("this port is open already; call manyheads.use again for a nested one")
        if not self._lasting or self._planned is not self.observer.run_marker:  # once in a run
            self._plan, self._planned = _plan(self.target, self.strategies), self.observer.run_marker
        self._traced: list[SiteState] = []
        if self._lasting:
            self._held = {(state.site.index, id(entry.strategy)): (state, entry) for state, entry in self._entries}
        self._entries = []
        try:
            sdpa_patch.open(self)
            self._restorers.append(lambda: sdpa_patch.close(self))
            for site, module, strategies in self._plan:
                self._attach(site, module, strategies)
            models = [model for _, model in denoisers(self.target)]
            for model in models:
                self._watch_denoiser(model)
            if not self._lasting:
                self.observer.open(models, self._restorers)
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
        while self._restorers:
            self._restorers.pop()()

    def state(self, strategy: Strategy) -> dict[str, dict[str, Any]]:
        """What ``strategy`` kept, by site name and then by branch; readable after closing too."""
        return {site.name: state for site, state in self.kept(strategy)}

    def kept(self, strategy: Strategy) -> list[tuple[Site, dict[str, Any]]]:
        """The same with the sites themselves, of the kind they showed, in the order of the model."""
        return [(state.last or state.site, e.state) for state, e in self._entries if e.strategy is strategy]

    def _attach(self, site: Site, module: nn.Module, strategies: list[Strategy]) -> None:
        held = [self._held.get((site.index, id(strategy))) for strategy in strategies]
        state: SiteState | None = module.__dict__.get(_STATE)
        if state is None:
            state = module.__dict__[_STATE] = held[0][0] if held and held[0] else SiteState(site)
        state.ports += 1
        entries = [
            was[1] if was else BoundStrategy(self, strategy) for was, strategy in zip(held, strategies, strict=True)
        ]
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

        def restore() -> None:
            for handle in handles:
                handle.remove()
            state.remove(self)
            state.ports -= 1
            if state.ports == 0:
                del module.__dict__[_STATE]

        self._restorers.append(restore)
        for entry in entries:
            if isinstance(strategy := entry.strategy, DenoiserModule):
                around = functools.partial(state.wrap_module, entry=entry, strategy=strategy)
                self._restorers.append(replace_forward(module, around))

    def _watch_denoiser(self, model: nn.Module) -> None:
        """Read step, branch and layout from a denoiser's inputs before it runs; apply ``denoise`` of strategies."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.look(module, args, kwargs)

        handle = model.register_forward_pre_hook(before, with_kwargs=True)
        self._restorers.append(handle.remove)
        strategies = [strategy for strategy in self.strategies if isinstance(strategy, DenoiserPrediction)]
        if strategies:
            self._restorers.append(replace_forward(model, self._denoising(model, strategies)))

    def look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read step, branch and layout of a call of a denoiser."""
        if torch.compiler.is_compiling():
            return
        step = self.observer.step(model, arguments(model, args, kwargs))
        for state, _ in self._entries:
            state.step = step

    def _denoising(self, model: Any, strategies: list[DenoiserPrediction]) -> Callable[..., Callable[..., Any]]:
        """The forward of a denoiser as ``strategies`` have it; the forward before it is what ``predict`` calls.

        Each starts from the plain prediction, and what it adds is added. Predictions that are neither conditional nor
        unconditional are others' means to their guidance, and left alone.
        """
        states = [state for state, _ in self._entries]

        def around(inner: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = arguments(model, args, kwargs)
                step = next((state.step for state in states if state.step is not None), None)
                step = step or self.observer.step(model, given)
                made: list[Any] = []

                def run(branch: str = "", **changes: Any) -> Tensor:
                    seen = replace(step, branches=(branch,)) if branch else step
                    for state in states:
                        state.step = seen
                    try:
                        made.append(inner(**{**given, **changes}))
                    finally:
                        for state in states:
                            state.step = step
                    first: Any = made[-1][0]
                    if not isinstance(first, Tensor):
                        raise UserError(
                            f"{type(model).__name__} predicts no single tensor; guide it by its guider only"
                        )
                    return first

                if _GUIDED.isdisjoint(step.branches):
                    return inner(*args, **kwargs)
                total: Any = None
                for strategy in strategies:
                    scale = self.observer.guidance(strategy.slug, model, step.branches)
                    start = len(made)
                    out = strategy.denoise(DenoiserCall(step, given, self.observer.scheduler, scale, run))
                    total = out if total is None else total + (out - made[start][0])
                    for _, entry in self._entries:
                        entry.called = entry.called or (entry.strategy is strategy and not _acts(strategy))
                return repacked(made[0], total)

            return forward

        return around
