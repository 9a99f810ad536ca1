# SPDX-License-Identifier: Apache-2.0
"""Which forward of a model a call of an attention module belongs to, and which of its calls in that forward it is.

A module may be called several times in one forward: layers may share it (ALBERT, Zamba 2), and a backward pass with
gradient checkpointing runs it again. What is watched is counted by forward of the model and by place in it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..call import Site
from ..strategy import AttentionWatch
from .hook_chain import BoundStrategy, Forward

__all__ = ["by_place", "count_forwards", "owner_of"]


def count_forwards(model: nn.Module, entries: Sequence[tuple[Site, nn.Module, BoundStrategy]]) -> Callable[[], None]:
    """Tell strategies that watch which forward is under way: that of the innermost model around each site.

    Returns:
        A function that takes the hooks off again.
    """
    forwards: dict[tuple[int, int], Forward] = {}
    handles = []
    for site, _, entry in entries:
        if not isinstance(entry.strategy, AttentionWatch):
            continue
        owner = owner_of(model, site)
        key = id(owner), id(entry.strategy)
        if key not in forwards:
            made = forwards[key] = Forward()
            handles += [
                owner.register_forward_pre_hook(made.begin),
                owner.register_forward_hook(made.end, always_call=True),
            ]
        entry.forward = forwards[key]
        entry.forward.entries.append(entry)

    def restore() -> None:
        for handle in handles:
            handle.remove()

    return restore


def owner_of(model: nn.Module, site: Site) -> nn.Module:
    """The innermost model of transformers around ``site``; ``model`` where there is none."""
    parts = site.name.split(".")
    around = (model.get_submodule(".".join(parts[:end])) for end in range(len(parts) - 1, -1, -1))
    return next((module for module in around if isinstance(module, PreTrainedModel)), model)


def by_place(kept: Sequence[tuple[Site, BoundStrategy]]) -> list[tuple[Site, dict[str, Any]]]:
    """What a strategy kept, by site; a module that was called several times in one forward is a site for each of them.

    In a model that has such modules sites stand in the order of its calls, and layers are their numbers.
    """
    shared = {id(entry.forward) for _, entry in kept if len(entry.places) > 1}
    if not shared:
        return [(site, entry.state) for site, entry in kept]
    made: list[tuple[tuple[int, int], Site, dict[str, Any]]] = []
    models: dict[int, int] = {}
    for i, (site, entry) in enumerate(kept):
        forward = id(entry.forward)
        first, count = models.setdefault(forward, i), len(entry.places)
        if forward not in shared or not count:
            made.append(((first, i), site, entry.state))
        for place, (order, state) in enumerate(entry.places if forward in shared else ()):
            name = site.name if count == 1 else f"{site.name} (call {place + 1} of {count})"
            made.append(((first, order), replace(site, name=name, layer=order), state))
    made.sort(key=lambda row: row[0])
    return [(replace(site, index=i), state) for i, (_, site, state) in enumerate(made)]
