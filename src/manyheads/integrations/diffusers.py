# SPDX-License-Identifier: Apache-2.0
"""The port of diffusers: attention of a denoiser, seen where torch's SDPA is called on its behalf.

Every attention module puts its site on a stack while it runs; while a port is open, torch's SDPA and diffusers' other
attention backends are wrapped, and look at the top of that stack. So queries, keys and values are those after norms and
rotary positions, and no processor of any model has to be rewritten. Which rows are which branch is read from the
pipeline or its guider, evaluations are counted in each run, and state is kept for each branch apart. The calls of
modules are reached through their class (:mod:`.module_calls`), so that offloading and compiling change nothing.

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

from ..call import Axis, DenoiserCall, DiffusionStep, Layout, Site
from ..conditioning import DenoiserWeights
from ..errors import UserError
from ..inpainting import Inpainter
from ..strategy import Attention, Cache, Denoiser, DenoiserModule, DenoiserPrediction, Strategy
from .hook_chain import BoundStrategy
from .images import encode
from .layouts import arguments
from .module_calls import CallChain, Restore, unwrapped, wrap_call
from .pipeline_state import PipelineObserver
from .run_check import RunCheck
from .sdpa_patch import SiteState, sdpa_patch

__all__ = ["DiffusersPort", "denoisers", "find_sites", "is_open", "set_layout"]

_DENOISERS = ("transformer", "transformer_2", "unet", "prior")
_KINDS = (DiffusersAttention, MochiAttention, AttentionModuleMixin)
_STATE = "_manyheads"
_GUIDED = frozenset({"cond", "uncond", "all", "unknown"})


def denoisers(target: Any) -> list[tuple[str, nn.Module]]:
    """The denoisers of a pipeline with the names of its components, or the model itself under an empty name.

    A compiled one is what torch.compile made.
    """
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
        for name, module in sorted(unwrapped(model).named_modules(), key=_order):
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
    if isinstance(strategy, DenoiserWeights):
        raise UserError(f"{strategy.slug} has weights that are trained with a denoiser: docs/diffusion.md")
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
        self._owners: dict[int, int] = {}
        self._entries: list[tuple[SiteState, BoundStrategy]] = []
        self._held: dict[tuple[int, int], tuple[SiteState, BoundStrategy]] = {}
        self._restorers: list[Restore] = []
        self._runs = RunCheck()
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
            self._owners = {id(m): id(model) for _, model in denoisers(self.target) for m in unwrapped(model).modules()}
        self._traced: list[SiteState] = []
        if self._lasting:
            self._held = {(state.site.index, id(entry.strategy)): (state, entry) for state, entry in self._entries}
        self._entries = []
        try:
            sdpa_patch.open(self)
            self._restorers.append(lambda: sdpa_patch.close(self))
            attached = [(module, *self._attach(site, module, strategies)) for site, module, strategies in self._plan]
            models = [model for _, model in denoisers(self.target)]
            for model in models:
                self._watch_denoiser(model)
            self._runs.expected = [
                (self._owners[id(module)], state, entry) for module, state, entries in attached for entry in entries
            ]
            if not self._lasting:
                self.observer.inpainters = tuple(s for s in self.strategies if isinstance(s, Inpainter))
                self.observer.open([unwrapped(model) for model in models], self._restorers)
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None:
            if not self._lasting:
                self._runs.end(self.observer.failed)
            self._runs.check(self.observer.idle_calls, type(self.target).__name__)

    def _restore(self) -> None:
        while self._restorers:
            self._restorers.pop()()

    def state(self, strategy: Strategy) -> dict[str, dict[str, Any]]:
        """What ``strategy`` kept, by site name and then by branch; readable after closing too."""
        return {site.name: state for site, state in self.kept(strategy)}

    def kept(self, strategy: Strategy) -> list[tuple[Site, dict[str, Any]]]:
        """The same with the sites themselves, of the kind they showed, in the order of the model."""
        return [(state.last or state.site, e.state) for state, e in self._entries if e.strategy is strategy]

    def _attach(
        self, site: Site, module: nn.Module, strategies: list[Strategy]
    ) -> tuple[SiteState, list[BoundStrategy]]:
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

        def call(inner: Callable[..., Any], *given: Any, **kwargs: Any) -> Any:
            within: Callable[..., Any] = functools.partial(inner, **kwargs)
            for entry in entries:
                if isinstance(strategy := entry.strategy, DenoiserModule):
                    within = state.wrap_module(within, entry, strategy)
            tensors = [x for x in (*given, *kwargs.values()) if isinstance(x, Tensor)]
            text = kwargs.get("encoder_hidden_states", given[1] if len(given) > 1 else None)
            processor = type(getattr(module, "processor", None)).__name__
            state.enter(tensors[0] if tensors else None, text if isinstance(text, Tensor) else None, processor)
            self.stack().append(state)
            try:
                return within(*given)
            finally:
                self.stack().pop()
                state.hidden = state.text = None

        self._restorers.append(wrap_call(module, call)[1])

        def restore() -> None:
            state.remove(self)
            state.ports -= 1
            if state.ports == 0:
                del module.__dict__[_STATE]

        self._restorers.append(restore)

        return state, entries

    def _watch_denoiser(self, model: nn.Module) -> None:
        """Read step, branch and layout from a denoiser's inputs before it runs; apply ``denoise`` of strategies."""
        seen: dict[str, Any] = {"call": None}
        plain, strategies = unwrapped(model), [s for s in self.strategies if isinstance(s, DenoiserPrediction)]

        def call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if chain.extra or (torch.compiler.is_compiling() and not strategies):
                return inner(*args, **kwargs)
            given = arguments(plain, args, kwargs)
            chain.calls += chain.depth == 0
            if seen["call"] != chain.calls:  # once, however often a port around this one asks for it
                seen.update(call=chain.calls, step=self.observer.step(plain, given))
                self._runs.see(seen["step"].run, id(model), self.observer.failed)
            step = seen["step"]
            if chain.depth == 0:
                for state, _ in self._entries:
                    state.step = step
            else:  # the port that was opened last says the step to all
                step = next((state.step for state, _ in self._entries if state.step is not None), step)
            chain.depth += 1
            try:
                if not strategies or _GUIDED.isdisjoint(step.branches):
                    return inner(*args, **kwargs)
                return self._predict(model, chain, step, given, inner)
            finally:
                chain.depth -= 1

        chain, restore = wrap_call(model, call)
        self._restorers.append(restore)

    def _predict(
        self, model: nn.Module, chain: CallChain, step: DiffusionStep, given: dict[str, Any], inner: Callable[..., Any]
    ) -> Any:
        """The output of a denoiser as strategies have it; ``inner`` is its own call.

        Each starts from the plain prediction, and what it adds is added. Predictions that are neither conditional nor
        unconditional are others' means to their guidance, and left alone.
        """
        states, made = [state for state, _ in self._entries], list[Any]()

        def run(branch: str = "", **changes: Any) -> Tensor:
            seen = replace(step, branches=(branch,)) if branch else step
            for state in states:
                state.step = seen
            chain.extra += bool(branch)
            try:
                made.append(inner(**{**given, **changes}))
            finally:
                chain.extra -= bool(branch)
                for state in states:
                    state.step = step
            first: Any = made[-1][0]
            if not isinstance(first, Tensor):
                raise UserError(f"{type(model).__name__} predicts no single tensor; guide it by its guider only")
            return first

        total: Any = None
        for strategy in (s for s in self.strategies if isinstance(s, DenoiserPrediction)):
            scale = self.observer.guidance(strategy.slug, model, step, given)
            start = len(made)
            observer, pipe = self.observer, self.observer.pipe
            to_latents = None if pipe is None else functools.partial(encode, pipe)
            call = DenoiserCall(
                step, given, observer.scheduler, scale, run, observer.rescales, to_latents, observer.prompts
            )  # fmt: skip
            out = strategy.denoise(call)
            total = out if total is None else total + (out - made[start][0])
            self._runs.predicted(strategy, id(model))
            for _, entry in self._entries:
                entry.called = entry.called or (entry.strategy is strategy and not _acts(strategy))
        return repacked(made[0], total)
