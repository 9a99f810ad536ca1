# SPDX-License-Identifier: Apache-2.0
"""Muon of stacks is Muon of matrices, and each parameter has the optimiser that it should."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.training.optimizers import Muon, optimizers_of, orthogonalise
from tolerance import FORMULA, MODEL, assert_close, error, within

LONG = within(torch.float64, 8 * MODEL)  # five Newton-Schulz steps of three products each, and their normalisation


class Unrounded(TorchFunctionMode):
    """What asks for a tensor in bfloat16, in either way, gets a copy that is not rounded."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = (*args[1:], *(kwargs or {}).values())
        if func is torch.Tensor.bfloat16 or (func is torch.Tensor.to and any(x is torch.bfloat16 for x in given)):
            return args[0].clone()
        return func(*args, **(kwargs or {}))


def walked(shape: tuple[int, ...], dtype: torch.dtype, **theirs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How far four steps of the stacked Muon and of that of torch move the same matrices."""
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=dtype)
    stack = torch.nn.Parameter(start.clone())
    single = [torch.nn.Parameter(matrix.clone()) for matrix in start]
    ours = Muon([stack], 1e-2, 0.1)
    plain = torch.optim.Muon(single, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", **theirs)
    for _ in range(4):
        stack.grad = torch.randn(shape, dtype=dtype)
        for p, g in zip(single, stack.grad, strict=True):
            p.grad = g.clone()
        ours.step()
        plain.step()
    return stack.data - start, torch.stack([p.data for p in single]) - start


@pytest.mark.parametrize("shape", [(3, 24, 10), (3, 10, 24)])
def test_stacked_muon_is_the_muon_of_torch(shape):
    """In float64: both take their products in bfloat16, whose rounding depends on the processor and on the shape."""
    with Unrounded():
        got, want = walked(shape, torch.float64)
        other = error(*walked(shape, torch.float64, ns_steps=4))
    assert want.abs().max() > 0.01
    assert_close(got, want, LONG)
    assert other > 1e-2  # control: another update
    for unrounded, rounded in zip((got, want), walked(shape, torch.float64), strict=True):
        assert error(rounded, unrounded) > LONG  # control: rounding was left out, of ours and of theirs


def test_matrices_of_a_shape_are_a_stack():
    """Two shapes among each other, one matrix without a gradient: each moves as in a stack of its own."""
    torch.manual_seed(0)
    shapes = [(24, 10), (10, 24), (24, 10), (24, 10)]
    apart, single = ([torch.nn.Parameter(torch.ones(shape).double()) for shape in shapes] for _ in range(2))
    ours, alone = Muon(apart, 1e-2, 0.1), [Muon([p], 1e-2, 0.1) for p in single]
    with Unrounded():
        for _ in range(3):
            for i, (p, q) in enumerate(zip(apart, single, strict=True)):
                p.grad = None if i == 3 else torch.randn(p.shape, dtype=torch.float64)
                q.grad = None if i == 3 else p.grad.clone()
            ours.step()
            for one in alone:
                one.step()
    for p, q in zip(apart, single, strict=True):
        assert_close(p.data, q.data, FORMULA)
    assert not torch.equal(apart[0], torch.ones_like(apart[0])) and torch.equal(apart[3], torch.ones_like(apart[3]))


@pytest.mark.parametrize("shape", [(3, 24, 10), (3, 10, 24)])
def test_muon_orthogonalises_in_bfloat16(shape):
    """The products lose what their dtype rounds and no more: three roundings in each of five steps."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = orthogonalise(g)
    assert got.dtype == torch.bfloat16
    with Unrounded():
        want = orthogonalise(g)
    assert_close(got, want, 15 * torch.finfo(torch.bfloat16).eps)
    assert error(orthogonalise(g.flatten(0, 1)[None]).view(shape), want) > 0.2  # control: one matrix for the stack


def test_singular_values_end_near_one():
    found = torch.linalg.svdvals(orthogonalise(torch.randn(2, 16, 40)).float())
    assert bool(((found > 0.5) & (found < 1.5)).all())


def models():
    yield Decoder("softmax", DecoderConfig(32, 16, 2, 2))
    yield LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip


@pytest.mark.parametrize("model", list(models()), ids=["decoder", "llama"])
def test_every_parameter_has_one_optimiser(model):
    for name in ("adamw", "muon"):
        groups = [g for each in optimizers_of(model, 1e-3, name) for g in each.param_groups]
        taken = [id(p) for group in groups for p in group["params"]]
        assert len(taken) == len(set(taken)) and set(taken) == {id(p) for p in model.parameters()}
        assert {group["lr"] for group in groups} == {1e-3}
        assert all((group["weight_decay"] > 0) == (p.ndim == 2) for group in groups for p in group["params"])
    muon, adamw = optimizers_of(model, 1e-3, "muon")
    vocabulary = [p for group in adamw.param_groups for p in group["params"] if p.ndim == 2]
    assert vocabulary and all(32 in p.shape and p.shape[0] == 32 for p in vocabulary)
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])


def test_frozen_parameters_are_left_out():
    model = Decoder("softmax", DecoderConfig(32, 16, 1, 2))
    model.embed.weight.requires_grad_(False)
    (adamw,) = optimizers_of(model, 1e-3)
    assert all(p is not model.embed.weight for group in adamw.param_groups for p in group["params"])
