# SPDX-License-Identifier: Apache-2.0
"""Kernels as torch operators that cost nothing where no compiler looks on, and are compiled together.

The dispatch of a custom operator imports the compiler the first time, which takes seconds and more than the kernels
themselves do. So an operator that is called with plain tensors, without a gradient and outside of ``torch.compile``,
runs its function directly; everyone else gets the operator. Its first call finds which kernels it launches, compiles
them in threads, and only then launches them.

Triton compiles for, and launches on, the current device of the thread, whatever the tensors lie on. :func:`launch`
makes that the device of the tensors, in the caller's thread and in those that compile.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

try:
    from triton.runtime._async_compile import AsyncCompileMode
except ImportError:  # it is no public interface; without it kernels are compiled one after the other
    AsyncCompileMode = None

__all__ = ["LOG2E", "compile_together", "launch", "operator", "plain"]

LOG2E = 1.4426950408889634  # the kernels' exponentials are of base 2

_dry: ContextVar[list[int] | None] = ContextVar("manyheads_dry", default=None)  # the devices of what is not run


def plain(*inputs: Any) -> bool:
    """Whether nothing looks on: neither a compiler nor a subclass, as fakes are."""
    return not torch.compiler.is_compiling() and all(
        type(x) in (Tensor, torch.nn.Parameter) for x in inputs if isinstance(x, Tensor)
    )


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Run a kernel on the device of its tensors; within :func:`compile_together` it is compiled only."""
    of = next(x for x in args if isinstance(x, Tensor))
    with torch.cuda.device_of(of):
        if (devices := _dry.get()) is None:
            kernel[grid](*args, **constants)
        else:
            devices.append(of.get_device())
            kernel.warmup(*args, grid=grid, **constants)


def compile_together(*calls: Callable[[], object]) -> None:
    """Compile all kernels that the calls :func:`launch`, at once, in threads, without running one.

    What fails here is compiled when it is launched. Calls within the calls compile nothing of their own.
    """
    if AsyncCompileMode is None or _dry.get() is not None or not torch.cuda.is_available():
        return
    devices: list[int] = []
    token = _dry.set(devices)
    try:
        with ThreadPoolExecutor() as pool:
            with AsyncCompileMode(pool, ignore_errors=True) as mode:
                for call in calls:
                    call()
            for kernel in [future.kernel for future in mode.future_kernels.values() if future.kernel is not None]:
                pool.submit(_load, kernel, devices[0])
    finally:
        _dry.reset(token)


def _load(kernel: Any, device: int) -> None:
    """Load a compiled kernel onto a device, and build what launches it."""
    with torch.cuda.device(device):
        kernel.run  # noqa: B018


class _Operator:
    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.function, self.first = function, True
        self.custom: Any = torch.library.custom_op(f"manyheads::{name}", mutates_args=())(function)
        self.register_fake = self.custom.register_fake

    def __call__(self, *args: Any) -> Any:
        grad = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        if grad or not plain(*args):
            return self.custom(*args)
        if self.first:
            self.first = False
            compile_together(lambda: self.function(*args))
        return self.function(*args)


def operator(name: str) -> Callable[[Callable[..., Any]], _Operator]:
    """Make a function that launches kernels the torch operator ``manyheads::name``, without a gradient."""
    return lambda function: _Operator(name, function)
