# SPDX-License-Identifier: Apache-2.0
"""One pass over a text, or images, that gathers all that a conversion wants, see :mod:`manyheads.calls.calibration`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calls.calibration import Statistic, Statistics
from ..conversion import SurgeryPlan
from ..progress import Progress
from .anatomy import ModelAnatomy, shared_copy
from .surgery import converted

__all__ = ["calibrate", "nats"]


def calibrate(
    model: Any, batches: Sequence[Tensor], wanted: Sequence[Statistic], progress: Progress | None = None
) -> Statistics:
    """Gather ``wanted`` of a model, in evaluation mode, over batches; nothing is run where nothing is wanted.

    Args:
        model: of a known family.
        batches: token ids ``[B, T]``, without padding, or images ``[B, C, h, w]``, on the model's device.
        wanted: statistics; those of one name are gathered once.
        progress: is told of batches.
    """
    anatomy = ModelAnatomy(model)
    unique = {statistic.name: statistic for statistic in wanted}
    sums = _Sums(anatomy, list(unique.values()))
    sequences = tokens = 0
    if unique:
        with torch.inference_mode(), sums.watching():
            for i, batch in enumerate(batches):
                if progress is not None:
                    progress(i, len(batches), "calibration")
                _forward(model, batch)
                sequences, tokens = sequences + len(batch), tokens + sums.read
    values = {
        name: [statistic.finish(total, sequences, tokens) for total in sums.totals[name]]
        for name, statistic in unique.items()
    }
    trial = slope = None
    if anatomy.causal:

        @cache
        def slopes() -> ModelAnatomy:
            return _slopes(model, batches)

        def slope(part: str, layer: int) -> Tensor:
            return slopes().weight(part, layer)

        def trial(plan: SurgeryPlan) -> float:
            return float(torch.cat([nats(converted(model, plan), batch) for batch in batches]).mean())

    return Statistics(values, tokens, trial, slope)


def _slopes(model: Any, batches: Sequence[Tensor]) -> ModelAnatomy:
    """The model with the gradient of its mean loss in the place of each weight."""
    rows = sum(len(ids) for ids in batches)
    with torch.inference_mode(False), torch.enable_grad():
        own = shared_copy(model, apart=True)
        for ids in batches:
            logits = own(input_ids=ids[:, :-1], use_cache=False).logits.float()
            (nn.functional.cross_entropy(logits.mT, ids[:, 1:]) * (len(ids) / rows)).backward()
        for p in own.parameters():
            p.data, p.grad = torch.zeros_like(p) if p.grad is None else p.grad, None
    return ModelAnatomy(own)


@torch.inference_mode()
def nats(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each token of ``ids [B, T]`` but the first, ``[B, T - 1]``, float32."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")


def _forward(model: Any, batch: Tensor) -> None:
    if batch.is_floating_point():
        model.base_model(pixel_values=batch.to(next(model.parameters()).dtype))
    elif hasattr(model.config, "use_cache"):
        model.base_model(input_ids=batch, use_cache=False)
    else:
        model.base_model(input_ids=batch)


class _Sums:
    """The running sums of some statistics.

    Attributes:
        totals: by name, one for each layer, or each norm.
        read: tokens of the batch at hand.
    """

    def __init__(self, anatomy: ModelAnatomy, statistics: Sequence[Statistic]) -> None:
        self.anatomy, self.statistics = anatomy, statistics
        modules = anatomy.model.base_model.named_modules()  # a head has norms of its own, which read no stream
        self.norms = [m for n, m in modules if n.rpartition(".")[2] in anatomy.map.norms]
        places = {statistic.name: statistic.place for statistic in statistics}
        count = {name: len(self.norms if place == "norms" else anatomy.layers) for name, place in places.items()}
        self.totals: dict[str, list[Any]] = {name: [None] * n for name, n in count.items()}
        self.read = 0
        self.middles: dict[int, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on the model, as long as this is open."""
        handles: list[Any] = []
        try:
            places = {statistic.place for statistic in self.statistics}
            for layer, block in enumerate(self.anatomy.blocks):
                handles.append(block.register_forward_hook(self._block(layer), with_kwargs=True))
                if "stream" in places:
                    middle = block.get_submodule(self.anatomy.middle)
                    handles.append(middle.register_forward_pre_hook(partial(self._middle, layer)))
                for place, part in (("attention", "q"), ("heads", "o"), ("mlp", "up"), ("neurons", "down")):
                    if place in places:
                        fused = place == "attention" and not self.anatomy.map.parts.get(part)
                        module = self.anatomy.linear("qkv" if fused else part, layer)
                        handles.append(module.register_forward_pre_hook(self._inputs(place, layer)))
            for i, norm in enumerate(self.norms if "norms" in places else ()):
                handles.append(norm.register_forward_hook(lambda _, args, out, i=i: self._add("norms", i, out)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _block(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = out[0] if isinstance(out, tuple) else out
            self.read = before.shape[0] * before.shape[1]
            self._add("block", layer, before, after)
            if layer in self.middles:
                self._add("stream", layer, before, self.middles.pop(layer), after)

        return hook

    def _middle(self, layer: int, module: nn.Module, args: Any) -> None:
        self.middles[layer] = args[0]

    def _inputs(self, place: str, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            x = args[0]
            self._add(
                place, layer, x.unflatten(-1, (-1, self.anatomy.layers[layer].head_dim)) if place == "heads" else x
            )

        return hook

    def _add(self, place: str, at: int, *tensors: Tensor) -> None:
        for statistic in self.statistics:
            if statistic.place == place:
                weights = [self._weight(part, at).float() for part in statistic.parts]
                more = statistic.add(*(x.float() for x in tensors), *weights)
                held = self.totals[statistic.name][at]
                self.totals[statistic.name][at] = more.double() if held is None else held + more

    def _weight(self, part: str, at: int) -> Tensor:
        """A weight, or of ``part.bias`` a bias, zeros where there is none."""
        name, _, bias = part.partition(".")
        weight = self.anatomy.weight(name, at)
        if not bias:
            return weight
        found = self.anatomy.bias(name, at)
        return weight.new_zeros(len(weight)) if found is None else found
