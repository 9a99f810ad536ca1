# SPDX-License-Identifier: Apache-2.0
"""The port of transformers models: attention seen through the library's own AttentionInterface.

Two attention functions are registered under names of ours, each with its mask function (a name without one would lose
the padding mask in silence): ``manyheads`` goes on to SDPA, ``manyheads_eager`` to the model's own eager function.
While a ``use`` is open, the configs of the model are replaced by copies that name ours; the originals come back at the
end, untouched, so that another model sharing a config notices nothing. All state sits on the modules of the model.
"""

import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..call import Site, Store
from ..causal_lens import CausalLens
from ..errors import UserError
from ..strategy import (
    Attention,
    AttentionCompute,
    AttentionWatch,
    Cache,
    Denoiser,
    ImagePositions,
    Interleaved,
    LinearCompute,
    MidBlock,
    Residual,
    Strategy,
)
from ..unlearning import Unlearning
from ..writing import Decoding
from .blocks import add_in_blocks, watch_blocks
from .cache import SlotCache, StoreLayer, cache_arguments, expand, find_cache, given_with, install
from .cache_files import load_cache, save_cache
from .configs import switch_configs
from .forwards import by_place, count_forwards
from .functions import own_function, register_own
from .hook_chain import BoundStrategy, Keeper
from .image_positions import ImageReader, read_images
from .image_tokens import place_images
from .interleaved import read_interleaved
from .linear import compute_linear, find_linear
from .linear_layers import LinearLayers
from .passes import Passes, missed, stack_of
from .prompt_chunks import begin_forward, watch_generate
from .prompts_reduced import reduce_prompts
from .reduced import reduce_tokens
from .second_reading import read_again
from .shared_experts import share_parts
from .site_search import architectures, find_sites
from .sites import ATTENTION, SiteState, is_eager, register

__all__ = ["Port", "architectures", "find_sites", "load_cache", "new_cache", "prefill", "save_cache"]

_OPENING = threading.RLock()  # ports of one model may open in several threads
_ACTS = (watch_blocks, add_in_blocks, reduce_tokens, reduce_prompts, place_images, count_forwards)
_EXCLUSIVE: dict[type[Strategy], str] = {AttentionCompute: "computes the output", Cache: "keeps the cache"}


class Port:
    """An open or closed way into a model; made by :func:`manyheads.use`, opened by ``with``."""

    def __init__(self, model: nn.Module, strategies: tuple[Strategy, ...]) -> None:
        self.model = model
        self.strategies = strategies
        self._entries: list[tuple[Site, nn.Module, BoundStrategy]] = []
        self._restorers: list[Callable[[], None]] = []
        self._passes: list[tuple[Site, BoundStrategy, SiteState, Passes]] = []
        self._linears: list[LinearLayers] = []
        self._images: ImageReader | None = None
        self._ran = False
        self.thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        with _OPENING:
            return self._open()

    def _open(self) -> Self:
        if self._restorers:
            raise RuntimeError("this port is open already; call manyheads.use again for a nested one")
        register()
        sites = find_sites(self.model)
        linear = find_linear(self.model, len(sites))
        if not sites and not linear:
            raise UserError(_refusal(self.model))
        if sparse := [name for name, module in self.model.named_modules() if hasattr(module, "indexer")]:
            raise UserError(
                f"{type(self.model).__name__} chooses its keys by an indexer ({sparse[0]}), whose mask the port cannot "
                "pass on; use a model with ordinary attention"
            )
        chosen = self._choose(sites + linear)
        for _, module in sites:
            for owner in SiteState.owners(module):
                if (
                    owner.thread is not None
                    and owner.thread.is_alive()
                    and owner.thread is not threading.current_thread()
                ):
                    raise UserError(
                        f"{type(self.model).__name__} is in use with {owner.strategies[0].spec} in another thread, and "
                        "all its calls go through that port: run the threads inside one `with manyheads.use(...)`"
                    )
        self._entries, self._passes, self.thread = [], [], threading.current_thread()
        self._linears, self._images = [], None
        try:
            for computing in (s for s in self.strategies if isinstance(s, LinearCompute)):
                self._linears.append(LinearLayers(self.model, sites, computing))
                self._restorers.append(self._linears[-1].detach)
                self._linears[-1].attach()
            own = register_own((module for _, module in sites), ATTENTION)
            self._restorers.append(switch_configs(self.model, own))
            keepers = {id(strategy): Keeper() for strategy in self.strategies}
            for site, module in sites:
                state = SiteState.attach(site, module, is_eager(module))
                self._restorers.append(lambda m=module: SiteState.detach(m))  # type: ignore[misc]
                entries = [BoundStrategy(self, s, keeper=keepers[id(s)]) for s, at in chosen if site.index in at]
                self._restorers.append(lambda s=state: s.remove(self))  # type: ignore[misc]
                state.add(entries)
                self._entries += [(site, module, entry) for entry in entries]
                self._passes += [(site, entry, state, state.passes.copy()) for entry in entries]
            linears = compute_linear(self, linear, chosen, self._restorers)
            for act in _ACTS:
                self._restorers.append(act(self.model, self._entries))
            self._restorers.append(share_parts(self.model, self._entries + linears))
            self._ran = False

            def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                """The model itself runs, and not only a part of it."""
                self._ran = True
                ids = _read(args, kwargs)
                if ids is not None and not torch.compiler.is_compiling():
                    cache = find_cache(*kwargs.values(), *args)
                    expand(cache, ids.shape[0])
                    begin_forward(ids.shape[1], cache)

            def finish(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
                ids = _read(args, kwargs)
                if ids is not None and not torch.compiler.is_compiling():
                    made = out.values() if isinstance(out, dict) else ()  # a cache that the model made itself
                    read_again(self.model, find_cache(*kwargs.values(), *args, *made), ids)

            self._restorers.append(self.model.register_forward_pre_hook(note, with_kwargs=True).remove)
            self._restorers.append(self.model.register_forward_hook(finish, with_kwargs=True).remove)
            self._restorers += watch_generate(self.model, self.settle)
            if interleaved := [s for s in self.strategies if isinstance(s, Interleaved)]:
                self._restorers.append(read_interleaved(self.model, sites[0][0], interleaved))
            if placing := [s for s in self.strategies if isinstance(s, ImagePositions)]:
                self._images, restore = read_images(self.model, sites, placing)
                self._restorers.append(restore)
            self._entries += linears
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = [(site, entry, state.passes.since(before)) for site, entry, state, before in self._passes]
        try:
            if kind is None:
                self.settle()
        finally:
            self._restore()
        if kind is None:
            self._check_called()
            for linears in self._linears:
                linears.check()
            if self._images is not None:
                self._images.check()
            for sentence in missed(done):
                warnings.warn(sentence, stacklevel=2)

    def state(self, strategy: Strategy) -> dict[str, dict[str, Any]]:
        """What ``strategy`` kept in ``call.state``, by site name; readable after closing too."""
        return {site.name: state for site, state in self.kept(strategy)}

    def settle(self) -> None:
        """Have strategies that watch finish what they put off, while the keys are there."""
        for site, _, entry in self._entries:
            if isinstance(entry.strategy, AttentionWatch):
                for state in entry.states:
                    entry.strategy.settle(site, state)

    def kept(self, strategy: Strategy) -> list[tuple[Site, dict[str, Any]]]:
        """The same with the sites themselves, in the order of the model.

        A module that watchers saw several times in one forward (layers that share it) is a site for each call.
        """
        self.settle()
        return by_place([(site, entry) for site, _, entry in self._entries if entry.strategy is strategy])

    def _choose(self, sites: list[tuple[Site, nn.Module]]) -> list[tuple[Strategy, set[int]]]:
        """Sites of each strategy; refuses empty selections and two claims on one site."""
        chosen: list[tuple[Strategy, set[int]]] = []
        for strategy in self.strategies:
            if isinstance(strategy, Denoiser):
                raise UserError(f"{strategy.slug} acts on denoisers: open a pipeline of diffusers with it")
            acts = isinstance(strategy, (Attention, Residual, MidBlock, Cache))
            if isinstance(strategy, (ImagePositions, LinearCompute)) and not acts:
                continue
            if isinstance(strategy, CausalLens):
                raise UserError(f"{strategy.spec} asks prompts of its own: `manyheads inspect`, or its method locate")
            if isinstance(strategy, Decoding) and not acts:
                raise UserError(f"{strategy.spec} chooses what is written: `manyheads generate`, or manyheads.reply")
            if isinstance(strategy, Unlearning):
                raise UserError(f"{strategy.spec} makes a model forget by training it: its page names the recipe")
            if not acts:
                raise UserError(
                    f"{strategy.slug} does not act on a model that is trained already: it has to be built or trained "
                    "with it"
                )
            if isinstance(strategy, Cache):
                _check_states(self.model, strategy)
            at = {site.index for site, _ in sites if _acts(strategy, site)}
            if not at:
                there = ", ".join(sorted({f"{s.kind}{' causal' if s.causal else ''}" for s, _ in sites}))
                raise UserError(
                    f"{strategy.spec} finds no attention to act on in {type(self.model).__name__}: "
                    f"{_wanted(strategy, [site for site, _ in sites])}the model has "
                    f"{len(sites)} sites ({there}), layers {sorted({s.layer for s, _ in sites if s.layer is not None})}"
                )
            chosen.append((strategy, at))
        for site, module in sites:
            for strategy in (s for s, at in chosen if site.index in at and isinstance(s, AttentionCompute)):
                if site.kind != "linear" and (name := own_function(module)) is not None:
                    raise UserError(
                        f"{strategy.spec} computes the attention of {site.name}, and so does {name!r}, an attention "
                        'function of your own: load the model with attn_implementation="sdpa"'
                    )
            for kind, what in _EXCLUSIVE.items():
                claims: list[Strategy] = [s for s, at in chosen if site.index in at and isinstance(s, kind)]
                claims = SiteState.claims(module, kind) + claims
                if len(claims) > 1:
                    raise UserError(
                        f"{claims[0].spec} and {claims[1].spec} cannot hold together: each {what} of {site.name}"
                    )
        return chosen

    def _restore(self) -> None:
        with _OPENING:
            while self._restorers:
                self._restorers.pop()()

    def _check_called(self) -> None:
        for strategy in self.strategies:
            mine = [(site.name, entry.called) for site, _, entry in self._entries if entry.strategy is strategy]
            idle = [name for name, called in mine if not called]
            if (
                idle
                and self._ran
                and len(idle) < len(mine)
                and not {stack_of(name) for name in idle} & {stack_of(n) for n, called in mine if called}
            ):
                warnings.warn(
                    f"{strategy.spec} acted at {len(mine) - len(idle)} of {len(mine)} attention modules; the model did "
                    f"not run {', '.join(idle[:3])}{' and more' * (len(idle) > 3)}",
                    stacklevel=3,
                )
            elif idle:
                raise UserError(
                    f"{strategy.spec} selected {idle[0]}, and it was never called: the model did not run it in "
                    "the block; narrow it with layers=..., or run the model"
                )
        unused = {id(e.strategy): e.strategy for _, _, e in self._entries if isinstance(e.strategy, Cache)}
        for _, _, entry in self._entries:
            if entry.stored:
                unused.pop(id(entry.strategy), None)
        for strategy in unused.values():
            raise UserError(f"{strategy.spec} keeps the cache, but the model ran without one: pass use_cache=True")


def new_cache(model: nn.Module, strategy: Strategy, record: int = 0, room: int = 0) -> SlotCache:
    """A fresh cache of ``strategy`` for ``model``, to be passed as its ``past_key_values`` while the port is open.

    From transformers 5.24 that argument is ``cache``; :func:`cache_arguments` knows which.

    Args:
        model: a decoder-only transformers model.
        strategy: one with ``store``.
        record: keep the last ``record`` queries and the evidence of the last forward, so that the cache can be forked;
            sliding-window layers then keep all tokens.
        room: tokens that will be decoded at most. The storage then has a fixed size after each forward of more than
            one token, and decoding can be compiled: on a GPU ``generate`` runs it as a CUDA graph.

    Raises:
        UserError: the strategy keeps no cache, finds no site in the model, or cannot be compiled as ``room`` asks.
    """
    if not isinstance(strategy, Cache):
        raise UserError(
            f"{strategy.slug} keeps no cache; choose one of the caches category: `manyheads list --category caches`"
        )
    _check_states(model, strategy)
    sites = [(site, module) for site, module in find_sites(model) if _acts(strategy, site)]
    if not sites:
        raise UserError(f"{strategy.spec} finds no decoder self-attention in {type(model).__name__}")

    def make(site: Site) -> Store:
        store = strategy.store(site)
        store.record = record
        if room:
            store.reserve(room)
        return store

    cache = SlotCache(config=cast("PreTrainedConfig", model.config))
    install(cache, sites, make, strategy)
    return cache


def prefill(
    model: nn.Module, ids: Tensor, cache: SlotCache, chunk: int = 4096, progress: Callable[[int], None] | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Read all of ``ids [B, L]`` but the last token into ``cache``, ``chunk`` tokens at a time.

    A strategy that evicts after the prompt waits for the last chunk. With one that evicts after every chunk
    (``schedule=chunk``) no more than its budget and a chunk are ever held. ``model.generate(ids,
    past_key_values=cache)`` goes on from there. The port of the model must be open; rows must not be padded.

    Args:
        model: a decoder-only transformers model.
        ids: the prompt; a cache that has seen its beginning goes on after that.
        cache: from :func:`new_cache`.
        chunk: tokens at a time.
        progress: receives the number of tokens read, after every chunk.
        given: what else the model is given, as ``pixel_values``; the prompt is then one chunk.
    """
    stores = [layer.store for layer in cache.layers if isinstance(layer, StoreLayer)]
    more = {**cache_arguments(model, cache), **given_with(given or {}, ids.shape[1] - 1)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = 1
    start, last = int(cache.get_seq_length()), ids.shape[1] - 1
    chunk = last if given else chunk
    for at in range(start, last, chunk):
        piece = ids[:, at : min(at + chunk, last)]
        for store in stores:
            store.prefilling, store.prompt = at + chunk < last, last
        with torch.no_grad():
            model(input_ids=piece, **more)
        if progress is not None:
            progress(piece.shape[1])


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Tokens or embeddings that a model was called with."""
    given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    found = next((x for x in given if x is not None), None)
    return found if isinstance(found, Tensor) else None


def _acts(strategy: Strategy, site: Site) -> bool:
    """Whether ``strategy`` acts at ``site``: nothing is stored where a layer reuses what another stores."""
    return strategy.selects(site) and not (isinstance(strategy, Cache) and site.kv_sharing == "reuse")


_ELSEWHERE: tuple[tuple[dict[str, Any], str], ...] = (
    ({"causal": False}, "that of encoders, which is not causal"),
    ({"causal": True}, "causal attention, that of decoders"),
    *(({"kind": kind}, f"{kind}-attention") for kind in ("cross", "self", "joint")),
)


def _wanted(strategy: Strategy, sites: list[Site]) -> str:
    """What ``strategy`` would act on if the sites were others, as the beginning of a sentence."""
    for change, what in _ELSEWHERE:
        if any(_acts(strategy, replace(site, **change)) for site in sites):
            return f"it acts on {what}; "
    return ""


def _check_states(model: nn.Module, strategy: Strategy) -> None:
    """Refuse a cache strategy where the model remembers outside its cache."""
    if name := next((name for name, module in model.named_modules() if "recurrent_states" in vars(module)), None):
        raise UserError(
            f"{strategy.spec} cannot keep the cache of {type(model).__name__}: that keeps states on modules ({name}), "
            "where no cache counts, reorders or saves them; use another model"
        )


def _refusal(model: nn.Module) -> str:
    """Why ``model`` cannot be entered, and the way out, in one line."""
    can = architectures()
    some = ", ".join(name for name in ("llama", "qwen3", "mistral", "gemma2", "gpt2", "bert", "whisper") if name in can)
    return (
        f"{type(model).__name__} does not dispatch its attention through transformers' AttentionInterface, so the port "
        f"cannot enter it; {len(can)} architectures do ({some}, ...; "
        "all: manyheads.integrations.transformers.architectures())"
    )
