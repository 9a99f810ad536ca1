# SPDX-License-Identifier: Apache-2.0
"""Carries out a plan of surgery on a model of transformers, see :mod:`manyheads.conversion`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import Assign, Configure, Drop, Factorise, HeadDim, Prune, Replace, Share, Step, SurgeryPlan
from ..errors import UserError
from .anatomy import ModelAnatomy, shared_copy, turned
from .plan_size import kept_rows, module_of
from .surgery_parts import Absent, LowRankLinear, Same, SharedLinear

__all__ = ["converted", "operate"]


def converted(model: Any, plan: SurgeryPlan) -> Any:
    """A new model after ``plan``; what the plan leaves alone is shared with ``model``, which stays as it was.

    Raises:
        UserError: the plan does not fit the model.
    """
    return operate(shared_copy(model), plan)


def operate(model: Any, plan: SurgeryPlan) -> Any:
    """The same in place. Where a step does not bring its tensors along, room is made for them."""
    anatomy = ModelAnatomy(model)
    steps = plan.ordered
    with torch.no_grad():
        _prune(anatomy, [step for step in steps if isinstance(step, Prune)])
        for step in steps:
            if not isinstance(step, Prune | Drop):
                _CHANGES[type(step)](anatomy, step)
        _drop(anatomy, [step for step in steps if isinstance(step, Drop)])
    return model


def _prune(anatomy: ModelAnatomy, steps: list[Prune]) -> None:
    """Select along every dimension of every parameter what stays of its axis."""
    if not steps:
        return
    kept = [kept_rows(anatomy, steps, layer) for layer in range(len(anatomy.layers))]
    shared = {name: kept[0][name] for name in ("width",) if name in kept[0]}
    made: dict[int, nn.Parameter] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for name, parameter in list(anatomy.named_parameters()):
        path, _, last = name.rpartition(".")
        places.setdefault(id(parameter), []).append((anatomy.model.get_submodule(path), last))
        if id(parameter) in made:
            continue
        layer = anatomy.layer_of(name)
        rows = shared if layer is None else kept[layer]
        axes = anatomy.axes(name, parameter)
        assert axes is not None
        value = parameter.detach()
        for dim, axis in enumerate(axes):
            if axis in rows:
                value = value.index_select(dim, rows[axis].to(value.device))
        made[id(parameter)] = parameter if value.shape == parameter.shape else nn.Parameter(value.clone())
    before = anatomy.layers
    for key, held in places.items():
        for module, last in held:
            module.register_parameter(last, made[key])
            _resized(module)
    _tell(anatomy, steps, before, kept)


def _resized(module: Any) -> None:
    """Have a module say the size that its weight has."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = weight.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
    elif turned(module):
        module.nx, module.nf = weight.shape


def _tell(anatomy: ModelAnatomy, steps: list[Prune], before: Any, kept: list[dict[str, Tensor]]) -> None:
    """Have attention modules and the config say what is left."""
    config, fields = anatomy.config, anatomy.map.fields
    sizes = []
    for layer, (shape, rows) in enumerate(zip(before, kept, strict=True)):
        heads = len(rows["q"]) // shape.head_dim if "q" in rows else shape.heads
        kv = len(rows["kv"]) // shape.head_dim if "kv" in rows else shape.kv_heads
        attention: Any = anatomy.blocks[layer].get_submodule(anatomy.map.head)
        told = {
            "num_heads": heads, "num_attention_heads": heads, "num_key_value_heads": kv,
            "num_key_value_groups": heads // kv, "all_head_size": heads * shape.head_dim,
            "split_size": heads * shape.head_dim,
        }  # fmt: skip
        for name, value in told.items():
            if name in vars(attention):
                setattr(attention, name, value)
        neurons = len(rows["neurons"]) if "neurons" in rows else shape.neurons
        sizes.append({"heads": heads, "kv_heads": kv, "neurons": neurons, "head_dim": shape.head_dim})
    width = next((len(step.keep) for step in steps if step.axis == "width"), anatomy.width)
    if width != anatomy.width and anatomy.map.scaled_embedding:
        _rescale(anatomy, width)
    said: dict[str, Any] = {"width": width}
    said |= {name: value for name, value in sizes[0].items() if all(size[name] == value for size in sizes)}
    for name, value in said.items():
        field = fields.get(name)
        if field == "mlp_ratio":
            value, left = divmod(value, width)
            field = None if left else field  # a whole number, or the config cannot say it
        if field is not None:
            setattr(config, field, value)
    anatomy.__dict__.pop("layers", None)


def _rescale(anatomy: ModelAnatomy, width: int) -> None:
    """Embeddings are multiplied by the root of the new width: have what follows them see the same numbers."""
    embedding: Any = anatomy.model.get_input_embeddings()
    weight, old = embedding.weight.detach(), embedding.embed_scale
    new = torch.tensor(width**0.5).to(old)
    factor = old.to(weight.dtype) / new.to(weight.dtype)
    tied = anatomy.tied
    embedding.weight, embedding.embed_scale = nn.Parameter(weight * factor), new
    if tied:  # the output layer has the factor too; the last norm, whose gain is 1 + w, takes it away
        anatomy.model.get_output_embeddings().weight = embedding.weight
        norm: Any = anatomy.model.get_submodule(f"{anatomy.prefix}norm")
        norm.weight = nn.Parameter((1 + norm.weight.detach()) / factor - 1)


def _factorise(anatomy: ModelAnatomy, step: Factorise) -> None:
    out, inside = anatomy.weight(step.part, step.layer).shape
    like = anatomy.weight(step.part, step.layer)
    left = _brought(step, "left", (out, step.rank), like)
    right = _brought(step, "right", (step.rank, inside), like) if step.reads is None else _right_of(anatomy, step)
    _put(anatomy, step.part, step.layer, partial(LowRankLinear, left, right))


def _head_dim(anatomy: ModelAnatomy, step: HeadDim) -> None:
    attention: Any = anatomy.blocks[step.layer].get_submodule(anatomy.map.head)
    if not anatomy.map.narrows:
        raise UserError(f"the heads of {anatomy.family} models keep their channels: they turn with positions, or more")
    width = anatomy.layers[step.layer].heads * step.dim
    for part in "qkvo":
        module: Any = anatomy.linear(part, step.layer)
        old = module.weight
        shape = (old.shape[0], width) if part == "o" else (width, old.shape[1])
        module.register_parameter("weight", nn.Parameter(_brought(step, part, shape, old)))
        if module.bias is not None:
            module.register_parameter("bias", nn.Parameter(_brought(step, f"{part}.bias", shape[:1], old)))
        _resized(module)
    setattr(attention, anatomy.map.narrows, step.dim)
    attention.all_head_size, attention.scaling = width, step.dim**-0.5
    if {getattr(block.get_submodule(anatomy.map.head), anatomy.map.narrows) for block in anatomy.blocks} == {step.dim}:
        anatomy.config.head_dim = step.dim
    anatomy.__dict__.pop("layers", None)


def _right_of(anatomy: ModelAnatomy, step: Factorise) -> nn.Parameter:
    assert step.reads is not None
    other = anatomy.linear(step.part, step.reads)
    if not isinstance(other, LowRankLinear) or len(other.right) != step.rank:
        raise UserError(f"{step.part} of layer {step.reads} is not of rank {step.rank}: factorise it first")
    return other.right


def _share(anatomy: ModelAnatomy, step: Share) -> None:
    like = anatomy.weight(step.part, step.layers[0])
    atoms = nn.Parameter(_brought(step, "atoms", (step.atoms, *like.shape), like))
    count, (out, inside) = len(step.layers), like.shape
    coefficients = _brought(step, "coefficients", (count, step.atoms), like)
    sizes = {"left": (count, out, step.rank), "right": (count, step.rank, inside)} if step.rank else {}
    own = [_brought(step, name, size, like) for name, size in sizes.items()]
    for i, layer in enumerate(step.layers):
        factors = (own[0][i].clone(), own[1][i].clone()) if own else None
        _put(anatomy, step.part, layer, partial(SharedLinear, atoms, coefficients[i].clone(), factors))


def _replace(anatomy: ModelAnatomy, step: Replace) -> None:
    like = next(anatomy.blocks[step.layer].parameters())
    module: Any = module_of(step).to(like.device, like.dtype)
    if step.tensors:
        module.load_state_dict(dict(step.tensors))
    if step.part == "attention":  # what the attention of a model knows of it
        module.config, module.layer_idx = anatomy.config, step.layer
    anatomy.blocks[step.layer].set_submodule(anatomy.part(step.part), module)


def _assign(anatomy: ModelAnatomy, step: Assign) -> None:
    module: Any = anatomy.linear(step.part, step.layer)
    for name, value in step.tensors.items():
        old = getattr(module, name, None)
        if old is None:
            raise UserError(f"{step.part} of layer {step.layer} has no {name} to put numbers into")
        value = value.mT if turned(module) and value.ndim == 2 else value
        if value.shape != old.shape:
            raise UserError(f"{step.part} of layer {step.layer} is {list(old.shape)}, not {list(value.shape)}")
        module.register_parameter(name, nn.Parameter(value.to(old).clone()))


def _configure(anatomy: ModelAnatomy, step: Configure) -> None:
    for name, value in step.fields.items():
        setattr(anatomy.config, name, value)
        if name == "use_bidirectional_attention":  # what an attention module was made to be by it
            name, value = "is_causal", not value
        for block in anatomy.blocks:
            attention = block.get_submodule(anatomy.map.head)
            if name in vars(attention):
                setattr(attention, name, value)


_CHANGES: Mapping[type[Step], Callable[[ModelAnatomy, Any], None]] = {
    Factorise: _factorise, HeadDim: _head_dim, Share: _share, Replace: _replace, Assign: _assign, Configure: _configure,
}  # fmt: skip


def _brought(step: Step, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of a step in the dtype and on the device of the model."""
    value = step.tensors.get(name)
    if value is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if tuple(value.shape) != shape:
        raise UserError(f"{name} of a step is {list(shape)} here, not {list(value.shape)}")
    return value.detach().to(like).clone(memory_format=torch.contiguous_format)


def _put(anatomy: ModelAnatomy, part: str, layer: int, make: Callable[[nn.Parameter | None], nn.Module]) -> None:
    bias = getattr(anatomy.linear(part, layer), "bias", None)
    anatomy.blocks[layer].set_submodule(anatomy.part(part), make(bias))


def _drop(anatomy: ModelAnatomy, steps: list[Drop]) -> None:
    """Empty parts of blocks, take blocks out, and number the attention modules that are left."""
    if not steps:
        return
    blocks, config = anatomy.blocks, anatomy.config
    gone = {layer for step in steps if step.part == "block" for layer in step.layers}
    silent = {layer for step in steps if step.part == "attention" for layer in step.layers}
    if wrong := sorted(layer for step in steps for layer in step.layers if not 0 <= layer < len(blocks)):
        raise UserError(f"the model has {len(blocks)} layers, and none of number {wrong[0]}")
    for step in steps:
        for layer in step.layers if step.part != "block" else ():
            for path, how in anatomy.map.off[step.part].items():
                made = Same() if how == "same" else Absent(path == anatomy.map.modules["attention"])
                blocks[layer].set_submodule(path, made)
    left = [i for i in range(len(blocks)) if i not in gone]
    if not left:
        raise UserError("a model keeps one layer at least")
    for name, value in list(vars(config).items()):  # one entry a layer, such as layer_types
        if isinstance(value, list) and len(value) == len(blocks):
            setattr(config, name, [value[i] for i in left])
    setattr(config, anatomy.map.fields["layers"], len(left))
    kinds = getattr(config, "layer_types", None) or ()
    if len(set(kinds)) > 1 and left[0] in silent:
        raise UserError(
            "the first layer keeps its attention in a model whose layers differ: its cache is counted there"
        )
    number = 0
    for place, i in enumerate(left):
        module: Any
        for module in blocks[i].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place if len(set(kinds)) > 1 else number
        number += i not in silent
    for i in sorted(gone, reverse=True):
        del blocks[i]
