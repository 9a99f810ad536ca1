# SPDX-License-Identifier: Apache-2.0
"""Functions around the calls of a module that last while others take its ``forward`` off and on.

Offloading (accelerate), caches and offloading by groups (diffusers) and compilation all replace ``forward`` on the
module itself, some of them at every call of a pipeline, and give back what they once found there: whatever another
library put in its place is lost. A module's call is looked up on its class instead. So for as long as something is
around it, the module's class is a subclass of its own whose ``__call__`` goes through the functions and then on to the
class's, which runs whatever ``forward``, hooks and compiled code the module has by then.
"""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

from torch import nn

from ..errors import UserError

__all__ = ["CALLS", "CallChain", "Restore", "unwrapped", "wrap_call"]

Restore = Callable[[], None]

CALLS = "_manyheads_calls"


class CallChain:
    """What is around the calls of one module.

    Attributes:
        around: functions that are given what they are around, and the arguments of the call; the last is outermost.
        depth: ports whose function around the call at hand has begun and not ended.
        calls: from outside so far, which are not a function's own.
        extra: predictions at hand that a strategy asked for beside the pipeline's.
    """

    def __init__(self) -> None:
        self.around: list[Callable[..., Any]] = []
        self.depth = self.calls = self.extra = 0

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise UserError("a denoiser cannot be copied while its port is open: copy it before")


@functools.cache
def _through_chain(kind: Any) -> Any:
    """The subclass of ``kind`` whose instances are called through their chain."""
    plain = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        inner, chain = functools.partial(plain, self), self.__dict__.get(CALLS)
        for around in () if chain is None else chain.around:  # compiled code may have kept this call
            inner = functools.partial(around, inner)
        return inner(*args, **kwargs)

    own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind)(kind.__name__, (kind,), {**own, "__call__": call})


def wrap_call(module: nn.Module, around: Callable[..., Any]) -> tuple[CallChain, Restore]:
    """Have the calls of ``module`` go through ``around(inner, *args, **kwargs)``.

    Returns:
        What is around the module, and a function that takes ``around`` out again, in any order; with the last one the
        module's class is its own again.
    """
    chain: CallChain | None = module.__dict__.get(CALLS)
    if chain is None:
        chain = module.__dict__[CALLS] = CallChain()
        kind: Any = type(module)
        object.__setattr__(module, "__class__", _through_chain(kind))
    kept = chain
    kept.around = [*kept.around, around]

    def restore() -> None:
        kept.around = [other for other in kept.around if other is not around]
        kind: Any = type(module)
        if not kept.around and kind is _through_chain(kind.__base__):  # else another library's class is on top of it
            object.__setattr__(module, "__class__", kind.__base__)
            del module.__dict__[CALLS]

    return kept, restore


def unwrapped(module: nn.Module) -> nn.Module:
    """The module that torch.compile made another one around, or the module itself."""
    inner: nn.Module = module.__dict__.get("_modules", {}).get("_orig_mod", module)
    return inner
