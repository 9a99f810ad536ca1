# SPDX-License-Identifier: Apache-2.0
"""The port: the one place through which every attention computation of a model passes while it is open."""

import sys
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

    from ..strategy import Strategy
    from .diffusers import DiffusersPort
    from .transformers import Port

__all__ = ["use"]


def use(
    model: "torch.nn.Module | Any", *strategies: "Strategy | str", protect: Any = None, mesh: Any = None
) -> "Port | DiffusersPort":
    """Use strategies on a model for as long as a ``with`` block lasts.

        with manyheads.use(model, "slug:field=value"):
            model.generate(**inputs)

    Afterwards the model is exactly as before, also after an exception. Strategies act in the order given, and those of
    an outer ``use`` on the same model before those of an inner one. Without strategies the port is merely open, for
    caches made by :func:`manyheads.integrations.transformers.new_cache`.

    Args:
        model: a transformers model, or a module that contains one; a pipeline or denoiser of diffusers.
        strategies: strategies or their specs, ``"slug:field=value,..."``.
        protect: spans of tokens that the cache strategy may not drop, ``[(0, 40)]`` or a list of such for each row, see
            :mod:`manyheads.attention.protect`; the spec's own field ``protect`` if None.
        mesh: processes among which a strategy shares tokens (``manyheads list --category parallel``): a device mesh of
            one dimension, its process group, or a :class:`manyheads.parallel.World`; None for all processes, or this
            one alone where the strategy acts in one. What the model then takes and gives:
            :mod:`manyheads.integrations.shared_tokens`.

    Raises:
        UserError: ``protect`` finds no cache strategy, or one that cannot hold to it; the model does not
            dispatch its attention through transformers' interface; a strategy finds no site;
            two strategies claim the same site; at the end of the block, a selected site was never called.
    """
    from ..errors import UserError
    from ..parallelism import ContextParallelism
    from ..spec import parse
    from ..strategy import AttentionCompute, protected

    chosen = tuple(parse(s) for s in strategies)
    if protect is not None:
        chosen = protected(chosen, protect)
    if "diffusers" in sys.modules:  # a pipeline or denoiser of diffusers cannot be there without it
        from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline

        if isinstance(model, (DiffusionPipeline, ModelMixin, ModularPipeline)):
            if mesh is not None:
                raise UserError(
                    "mesh= shares the tokens of decoders; frames of a video: manyheads.parallel.FrameParallel"
                )
            from .diffusers import DiffusersPort

            return DiffusersPort(model, chosen)
    from .transformers import Port

    if mesh is not None or any(
        isinstance(s, ContextParallelism) and not isinstance(s, AttentionCompute) for s in chosen
    ):
        from .shared_tokens import among

        chosen = among(chosen, mesh)
    return Port(cast("torch.nn.Module", model), chosen)
