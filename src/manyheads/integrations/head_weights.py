# SPDX-License-Identifier: Apache-2.0
"""Where in the weights of a model a head's queries, keys, values and output are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..call import Site
from ..errors import UserError
from .blocks import output_path
from .site_search import find_sites
from .weights import held_weight

__all__ = ["HeadPart", "head_parts"]

HeadPart = tuple[nn.Parameter, int, tuple[int, ...]]  # a parameter, the dimension, and which rows or columns
_FUSED = ("c_attn", "qkv_proj")  # queries, then keys, then values
_APART = {"q": ("q_proj", "q_lin"), "k": ("k_proj", "k_lin"), "v": ("v_proj", "v_lin")}


def head_parts(model: nn.Module, heads: Sequence[str], parts: str = "qkv") -> list[HeadPart]:
    """Rows and columns that belong to heads, one entry for each parameter that has any.

    Biases of queries, keys and values go with their rows; that of the output is no head's. Where several heads share
    keys and values (grouped queries), those of a chosen head are its group's.

    Args:
        model: of transformers, not quantised and without adapters.
        heads: as ``layer.head``.
        parts: which of ``q``, ``k``, ``v`` and ``o``.

    Raises:
        UserError: a head or a part is not there, or the layer that holds it is not known.
    """
    if not parts or set(parts) - set("qkvo"):
        raise UserError(f"parts of a head are q, k, v and o, not {parts!r}")
    wanted: dict[int, list[int]] = {}
    for name in dict.fromkeys(heads):
        layer, _, head = name.partition(".")
        if not (layer.isdecimal() and head.isdecimal()):
            raise UserError(f"write heads as layer.head, not {name!r}")
        wanted.setdefault(int(layer), []).append(int(head))
    found: dict[tuple[int, int], tuple[nn.Parameter, int, set[int]]] = {}
    for site, module in find_sites(model):
        chosen = wanted.pop(site.index if site.layer is None else site.layer, [])
        for parameter, dim, rows in _of_site(model, site, module, chosen, parts) if chosen else ():
            found.setdefault((id(parameter), dim), (parameter, dim, set()))[2].update(rows)
    if wanted:
        raise UserError(f"the model has no layer {min(wanted)}")
    return [(parameter, dim, tuple(sorted(rows))) for parameter, dim, rows in found.values()]


def _of_site(
    model: nn.Module, site: Site, module: nn.Module, chosen: Sequence[int], parts: str
) -> Iterator[tuple[nn.Parameter, int, list[int]]]:
    count, groups = site.num_heads, site.num_kv_heads
    if count is None or max(chosen) >= count:
        raise UserError(f"{site.name} has {count} heads, and {max(chosen)} is asked for")
    groups = groups or count
    shared = sorted({head * groups // count for head in chosen})
    layers = {name: child for name, child in module.named_children() if held_weight(child) is not None}
    fused = next((layers[name] for name in _FUSED if name in layers), None)
    for part in (part for part in "qkv" if part in parts):
        if fused is not None:
            layer, width = fused, _outputs(fused) // (count + 2 * groups)
            start = width * {"q": 0, "k": count, "v": count + groups}[part]
        else:
            own = next((layers[name] for name in _APART[part] if name in layers), None)
            if own is None:
                raise UserError(f"{site.name}: where its {part} comes from is not known")
            layer, start = own, 0
            width = _outputs(own) // (count if part == "q" else groups)
        rows = [start + head * width + i for head in (chosen if part == "q" else shared) for i in range(width)]
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        yield weight, 1 if _turned(layer) else 0, rows
        if isinstance(bias := getattr(layer, "bias", None), nn.Parameter):
            yield bias, 0, rows
    if "o" in parts:
        name = output_path(model, site.name)
        layer = model.get_submodule(name) if name else nn.Identity()
        if held_weight(layer) is None:
            raise UserError(f"{site.name}: its output projection is not known")
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        dim = 0 if _turned(layer) else 1
        width = weight.shape[dim] // count
        yield weight, dim, [head * width + i for head in chosen for i in range(width)]


def _turned(layer: nn.Module) -> bool:
    """Whether the weight is ``[in, out]``, as GPT-2's."""
    return type(layer).__name__ == "Conv1D"


def _outputs(layer: nn.Module) -> int:
    weight = held_weight(layer)
    assert weight is not None
    return weight.shape[0]
