# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts of transformers whose experts several processes share (``parallelism.ExpertParallelism``).

A model's experts are one module a layer, with the weights of all as tensors of three dimensions (Mixtral, Qwen, OLMoE,
DeepSeek and others). Its calls go through the strategy's :class:`manyheads.parallelism.SharedExperts`. The weights stay
whole in every process, which uses those of its own experts: the gradients of the others are 0 there, and what
:func:`manyheads.parallel.sum_gradients` adds up is right for all.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..call import Site
from ..errors import UserError
from ..parallelism import ExpertParallelism, SharedExperts
from .hook_chain import BoundStrategy
from .module_calls import wrap_call
from .shared_tokens import SharedTokens, share_tokens

__all__ = ["share_experts", "share_parts"]

_PLAIN = {
    "has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False,
}  # fmt: skip


def share_parts(model: nn.Module, entries: Sequence[tuple[Site, nn.Module, BoundStrategy]]) -> Callable[[], None]:
    """Share the tokens of ``model``, and its experts, where strategies say so; gives a function that undoes it."""
    restorers = [share_tokens(model, entries)]
    try:
        restorers.append(share_experts(model, entries))
    except BaseException:
        restorers[0]()
        raise

    def restore() -> None:
        while restorers:
            restorers.pop()()

    return restore


def share_experts(model: nn.Module, entries: Sequence[tuple[Site, nn.Module, BoundStrategy]]) -> Callable[[], None]:
    """Have the experts of ``model`` be shared where a strategy of ``entries`` says so.

    Returns:
        A function that undoes it.

    Raises:
        UserError: the model has no experts, or some of another make.
    """
    sharing = next((e.strategy for _, _, e in entries if isinstance(e.strategy, SharedTokens)), None)
    if sharing is None or not isinstance(sharing.given, ExpertParallelism):
        return lambda: None
    found = [module for module in model.modules() if _weights(module)]
    if not found:
        raise UserError(f"{sharing.spec} shares experts, and {type(model).__name__} has none that are known here: give "
                        "a mixture of experts, as Mixtral, or a strategy that shares tokens alone")  # fmt: skip
    for module in found:
        if any(getattr(module, name, value) != value for name, value in _PLAIN.items()):
            raise UserError(f"{sharing.spec} knows gated experts without biases, not those of {type(module).__name__}")
    restorers = [wrap_call(module, _around(module, sharing.given, sharing.world))[1] for module in found]

    def restore() -> None:
        for undo in restorers:
            undo()

    return restore


def _weights(module: nn.Module) -> bool:
    both = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    return all(x is not None and x.ndim == 3 for x in both)


def _around(module: Any, strategy: ExpertParallelism, world: Any) -> Callable[..., Tensor]:
    """The call of a layer's experts on this process's tokens."""
    shared: dict[int, SharedExperts] = {}

    def call(_: Callable[..., Tensor], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        top_k = top_k_index.shape[1]
        if top_k not in shared:
            given = len(module.gate_up_proj), top_k, hidden_states[:1].nbytes
            shared[top_k] = strategy.share_experts(world, *given)
        weights = module.gate_up_proj, module.down_proj
        return shared[top_k].mixture(hidden_states, top_k_index, top_k_weights, *weights, module._apply_gate)

    return call
