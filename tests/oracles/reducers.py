# SPDX-License-Identifier: Apache-2.0
"""What every reducer of tokens must have: functions of a strategy, a model or a reduction, that raise if it has not."""

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads.reducing import Layout, Reducer, Reduction
from manyheads.strategy import AttentionWatch
from oracles.fingerprint import assert_same, of_model
from tiny.image_encoders import forward, images
from tolerance import CALL, DEEP, FORMULA, assert_close, error, is_far, within

SUMS = within(torch.float64, 4 * CALL)  # a mean, its sum over tokens, and the sum that it is compared with


class Counts(AttentionWatch):
    """How many queries and keys attention has, by site."""

    def watch(self, call, out):
        call.state["counts"] = call.q.shape[2], call.k.shape[2], out.shape[1]


def is_off(model, spec: str | Reducer) -> None:
    """The model under ``spec``, which reduces nothing, is bit for bit the model."""
    x = images()
    plain = forward(model, x)
    with manyheads.use(model, spec):
        assert torch.equal(forward(model, x), plain)


def is_on(model, spec: str | Reducer) -> list[tuple[int, int]]:
    """The output changes and has its shape; gives queries and keys of every attention, in order."""
    x, watch = images(), Counts()
    plain = forward(model, x)
    with manyheads.use(model, spec, watch) as port:
        got = forward(model, x)
    assert is_far(got, plain, DEEP)
    assert got.shape == plain.shape
    return [state["counts"][:2] for _, state in port.kept(watch)]


def is_restored(model, spec: str | Reducer) -> None:
    """After use, and after an error in the middle of a forward, all is as before; a second use gives the first."""
    x, before, outputs = images(), of_model(model), []
    plain = forward(model, x)
    for _ in range(2):
        with manyheads.use(model, spec):
            outputs.append(forward(model, x))
        assert_same(of_model(model), before)
        assert torch.equal(forward(model, x), plain)
    assert torch.equal(*outputs)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    last = [m for name, m in model.named_modules() if name.endswith("attention")][-1]
    handle = last.register_forward_hook(fail)
    with manyheads.use(model, spec):
        with pytest.raises(ZeroDivisionError):
            forward(model, x)
        handle.remove()
        assert torch.equal(forward(model, x), outputs[0])  # nothing of the forward that failed is left
    assert_same(of_model(model), before)
    assert torch.equal(forward(model, x), plain)


def is_row_by_row(model, spec: str | Reducer) -> None:
    """A batch is its images one by one."""
    x = images(3)
    with manyheads.use(model, spec):
        whole = forward(model, x)
        for row in range(3):
            assert_close(whole[row : row + 1], forward(model, x[row : row + 1]), DEEP)


def keeps_sums(reduction: Reduction, x: Tensor, size: Tensor | None = None) -> None:
    """What merging keeps: the sum of size times token, and the number of tokens."""
    before = torch.ones(x.shape[:2], dtype=x.dtype) if size is None else size
    assert reduction.size is not None
    merged = reduction.merge(x)
    assert merged.shape[1] == reduction.size.shape[1]
    assert_close((reduction.size[..., None] * merged).sum(1), (before[..., None] * x).sum(1), SUMS)
    assert torch.equal(reduction.size.sum(1), before.sum(1))


def is_projection(reduction: Reduction, x: Tensor) -> None:
    """Merging what was restored gives what was merged, and so does restoring it again: nothing is changed twice."""
    once = reduction.restore(reduction.merge(x))
    assert once.shape == x.shape
    assert error(reduction.restore(reduction.merge(once)), once) <= SUMS
    assert is_far(once, x, FORMULA)


def layout(height: int, width: int, prefix: int = 1, **more: object) -> Layout:
    """Of an image's patches behind a class token."""
    return Layout(grid=(height, width), prefix=prefix, **more)  # type: ignore[arg-type]
