# SPDX-License-Identifier: Apache-2.0
"""Which modules of a transformers model compute attention, and what is known of each before it runs."""

import functools
import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from ..call import Site
from .blocks import output_of
from .latent import latent_of

__all__ = ["architectures", "find_sites"]

_DISPATCHER = "ALL_ATTENTION_FUNCTIONS"
_CROSS = re.compile(r"cross|enc_?dec_?attention|encoder_attn", re.IGNORECASE)
_KEY_NORM = re.compile(r"(k|qk|key)_(layer_?)?norm|norm_k")


@functools.cache
def architectures() -> tuple[str, ...]:
    """Names of the model folders of the installed transformers whose attention the port can enter."""
    root = Path(transformers.__file__).parent / "models"
    files = root.glob("*/modeling_*.py")
    return tuple(sorted({f.parent.name for f in files if f"{_DISPATCHER}." in f.read_text(encoding="utf-8")}))


def find_sites(model: nn.Module) -> list[tuple[Site, nn.Module]]:
    """Attention modules of ``model`` whose forward dispatches through transformers' AttentionInterface."""
    found: list[tuple[Site, nn.Module]] = []
    for name, module in model.named_modules():
        forward = inspect.unwrap(type(module).forward)
        if _DISPATCHER in getattr(getattr(forward, "__code__", None), "co_names", ()):
            found.append((replace(_site(name, len(found), module), output=output_of(model, name)), module))
    keepers = [site for site, _ in found if site.causal and site.kv_sharing != "reuse"]
    peers = tuple(sorted({site.layer for site in keepers if site.layer is not None}))
    return [(replace(site, peers=peers), module) for site, module in found]


def _first(owners: tuple[Any, ...], names: tuple[str, ...]) -> Any:
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _site(name: str, index: int, module: nn.Module) -> Site:
    config = getattr(module, "config", None)
    cross = bool(getattr(module, "is_cross_attention", False)) or bool(_CROSS.search(name.rpartition(".")[2]))
    cross = cross or "cross" in type(module).__name__.lower()
    layer: int | None = getattr(module, "layer_idx", None)
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if (layer is None or layer < 0) and "layer_idx" in inspect.signature(type(module).forward).parameters:
        layer = next((int(part) for part in reversed(name.split(".")) if part.isdecimal()), None)  # told in its calls
    shared = _at(getattr(config, "kv_sharing_modes", None), layer)
    if config is not None and getattr(config, "is_heterogeneous", False) and layer is not None:
        config = config.per_layer_config[layer]
    heads = _first((module, config), ("num_heads", "num_attention_heads", "n_heads", "n_head"))
    return Site(
        name=name,
        index=index,
        layer=layer,
        kind="cross" if cross else "self",
        causal=not cross and bool(getattr(module, "is_causal", False)),
        num_heads=heads,
        num_kv_heads=_first((module, config), ("num_key_value_heads",)) or heads,
        window=_window(module, config, _at(types, layer)),
        kv_sharing=None if shared is None else "store" if shared == "store" else "reuse",
        keys_normed=_norms_keys(module),
        latent=latent_of(module),
    )


def _at(values: Any, layer: int | None) -> Any:
    """What a config says of a layer, None where it says nothing."""
    return values[layer] if values is not None and layer is not None and layer < len(values) else None


def _window(module: nn.Module, config: Any, kind: str | None) -> int | None:
    """Positions behind which a layer of this kind sees nothing; a chunk is no longer than that, wherever it starts."""
    sliding: int | None = None
    if kind is None or "sliding" in kind:
        sliding = _first((module, config), ("sliding_window",))
    if sliding is None and kind in (None, "chunked_attention"):
        sliding = _first((module, config), ("attention_chunk_size",))
    return sliding


def _norms_keys(module: nn.Module) -> bool:
    """Whether ``module`` normalises each key over the channels of its head; a norm over all heads at once is none."""
    norm = next((n for name, n in module.named_children() if _KEY_NORM.fullmatch(name)), None)
    weight = None if norm is None else next(norm.parameters(), None)
    return norm is not None and (weight is None or weight.shape[-1] == getattr(module, "head_dim", None))
