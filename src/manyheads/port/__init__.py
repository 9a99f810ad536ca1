# SPDX-License-Identifier: Apache-2.0
"""The port: the one place through which every attention computation of a model passes while it is open."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..strategy import Strategy
    from .transformers import Port

__all__ = ["use"]


def use(model: "torch.nn.Module", *strategies: "Strategy | str") -> "Port":
    """Use strategies on a model for as long as a ``with`` block lasts.

        with manyheads.use(model, "hashevict:budget=0.5"):
            model.generate(**inputs)

    Afterwards the model is exactly as before, also after an exception. Strategies act in the order given, and those of
    an outer ``use`` on the same model before those of an inner one. Without strategies the port is merely open, for
    caches made by :func:`manyheads.port.transformers.new_cache`.

    Args:
        model: a transformers model, or a module that contains one.
        strategies: strategies or their specs, ``"slug:field=value,..."``.

    Raises:
        UserError: the model does not dispatch its attention through transformers' interface; a strategy finds no site;
            two strategies claim the same site; at the end of the block, a selected site was never called.
    """
    from ..strategy import parse
    from .transformers import Port

    return Port(model, tuple(parse(s) for s in strategies))
