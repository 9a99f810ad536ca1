# SPDX-License-Identifier: Apache-2.0
"""Processes that begin in milliseconds, as copies of one that has loaded torch and transformers, where they can."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["started"]

_LOADED = ["torch.distributed.device_mesh", "transformers.modeling_utils", "transformers.models.llama.modeling_llama"]


def started(target: Callable[..., Any], args: tuple[Any, ...]) -> BaseProcess:
    """A process that runs ``target(*args)`` with the environment variables of now and ends with this one.

    It is forked from a server that has done nothing but load libraries; with a GPU, or on systems that have no such
    server, it begins from nothing and loads them itself. What libraries read from the environment as they are loaded is
    what it said when the first such process began.

    Args:
        target: a function of a module.
        args: what can be pickled, connections among it.
    """
    import torch

    served = "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available()
    context = multiprocessing.get_context("forkserver" if served else "spawn")
    if served:
        context.set_forkserver_preload(_LOADED)
    process = context.Process(target=_run, args=(dict(os.environ), target, args), daemon=True)  # type: ignore[attr-defined]
    process.start()
    made: BaseProcess = process
    return made


def _run(environment: Mapping[str, str], target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """In the new process: the variables of the server are those of when it began."""
    os.environ.clear()
    os.environ.update(environment)
    target(*args)
