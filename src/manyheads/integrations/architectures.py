# SPDX-License-Identifier: Apache-2.0
"""Axis maps: which dimension of which parameter belongs to what, for families of transformers' architectures.

A map is data. ``axes`` gives for a parameter, by its name without the prefix of the base model, the axis of each of its
dimensions:

    width    channels of the residual stream, D        q     query heads times their channels, H * d
    neurons  of the feed-forward part, I               kv    key/value heads times their channels, G * d
    dim      channels of a head, d                     qkv   q, k and v in a row
    -        none of these

A parameter that no pattern matches makes the model one that is not known, so that nothing is cut in half silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from ..errors import UserError

__all__ = ["FAMILIES", "Family", "families_of"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One axis map.

    Attributes:
        name: as conversions know it.
        types: ``model_type`` of configs.
        layers: path of the list of blocks in the base model.
        parts: linear layers of a block by what they are; ``qkv`` where the three are one.
        modules: the modules of a block that a plan may replace: ``attention``, and ``mlp``.
        head: of the attention module, which holds the number of its heads.
        narrows: the attribute of that module which holds the channels of a head, where these may become fewer.
        axes: by pattern (of fnmatch, ``*`` for the number of a layer), first match.
        off: modules of a block that are replaced when a part of it is dropped: by nothing (``zero``), or by what
            they are given (``same``).
        norms: names of modules that are norms of the residual stream.
        fields: of the config, by axis.
        causal: it is a decoder.
        scaled_embedding: embeddings are multiplied by the root of the width.
    """

    name: str
    types: frozenset[str]
    layers: str
    parts: Mapping[str, str]
    modules: Mapping[str, str]
    head: str
    narrows: str = ""
    axes: Mapping[str, str]
    off: Mapping[str, Mapping[str, str]]
    norms: tuple[str, ...]
    fields: Mapping[str, str] = field(default_factory=dict)
    causal: bool = True
    scaled_embedding: bool = False

    def axes_of(self, name: str) -> tuple[str, ...] | None:
        """Axes of a parameter by its name without the prefix of the base model; None where it is not known."""
        general = re.sub(r"\.\d+\.", ".*.", name)
        for pattern, axes in self.axes.items():
            if fnmatchcase(general, pattern.replace("*", "[*]").replace("?", "*")):
                return tuple(axes.split())
        return None


_FIELDS = {
    "layers": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads", "head_dim": "head_dim", "neurons": "intermediate_size",
}  # fmt: skip
_GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_QKVO = {x: f"self_attn.{x}_proj" for x in "qkvo"}


def _linear(part: str, out: str, inside: str) -> dict[str, str]:
    """Axes of a linear layer's weight and bias."""
    return {f"{part}.weight": f"{out} {inside}", f"{part}.bias": out}


def _attention(at: str) -> dict[str, str]:
    return {
        **_linear(f"{at}.q_proj", "q", "width"), **_linear(f"{at}.k_proj", "kv", "width"),
        **_linear(f"{at}.v_proj", "kv", "width"), **_linear(f"{at}.o_proj", "width", "q"),
        f"{at}.?_norm.weight": "dim",
    }  # fmt: skip


def _swiglu(at: str) -> dict[str, str]:
    return {
        **_linear(f"{at}.gate_proj", "neurons", "width"), **_linear(f"{at}.up_proj", "neurons", "width"),
        **_linear(f"{at}.down_proj", "width", "neurons"),
    }  # fmt: skip


_LLAMA_AXES = {
    "embed_tokens.weight": "- width", "lm_head.weight": "- width", "norm.weight": "width",
    "layers.*.?layernorm.weight": "width", **_attention("layers.*.self_attn"), **_swiglu("layers.*.mlp"),
}  # fmt: skip
_VIT_EMBEDDINGS = {
    "embeddings.cls_token": "- - width", "embeddings.mask_token": "- width", "embeddings.position_embeddings":
    "- - width", "embeddings.patch_embeddings.projection.weight": "width - - -",
    "embeddings.patch_embeddings.projection.bias": "width", "layernorm.?": "width",
    **_linear("pooler.dense", "-", "width"), **_linear("classifier", "-", "width"),
}  # fmt: skip
_VIT_PARTS = {**{x: f"attention.{x}_proj" for x in "qkvo"}, "up": "mlp.fc1", "down": "mlp.fc2"}
_FC = {**_linear("mlp.fc1", "neurons", "width"), **_linear("mlp.fc2", "width", "neurons")}


def _inside(at: str, axes: Mapping[str, str]) -> dict[str, str]:
    return {f"{at}.{name}": value for name, value in axes.items()}


_LLAMA = Family(
    name="llama",
    types=frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "ministral"}),
    layers="layers", parts=_QKVO | _GATED, modules={"attention": "self_attn", "mlp": "mlp"}, head="self_attn",
    axes=_LLAMA_AXES, fields=_FIELDS, norms=("input_layernorm", "post_attention_layernorm", "norm"),
    off={
        "attention": {"self_attn": "zero", "input_layernorm": "same"},
        "mlp": {"mlp": "zero", "post_attention_layernorm": "same"},
    },
)  # fmt: skip

_GEMMA1 = replace(_LLAMA, types=frozenset({"gemma"}), scaled_embedding=True)

_GEMMA = Family(
    name="gemma",
    types=frozenset({"gemma2", "gemma3_text"}), layers="layers", parts=_QKVO | _GATED,
    modules={"attention": "self_attn", "mlp": "mlp"}, head="self_attn", axes=_LLAMA_AXES, fields=_FIELDS,
    norms=("input_layernorm", "pre_feedforward_layernorm", "norm"), scaled_embedding=True,
    off={
        "attention": {"self_attn": "zero", "input_layernorm": "same", "post_attention_layernorm": "same"},
        "mlp": {"mlp": "zero", "pre_feedforward_layernorm": "same", "post_feedforward_layernorm": "same"},
    },
)  # fmt: skip

_GPT2 = Family(
    name="gpt2",
    types=frozenset({"gpt2"}), layers="h",
    parts={"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"},
    modules={"attention": "attn", "mlp": "mlp"}, head="attn",
    axes={
        "wte.weight": "- width", "wpe.weight": "- width", "lm_head.weight": "- width", "ln_f.?": "width",
        "h.*.ln_?": "width", "h.*.attn.c_attn.weight": "width qkv", "h.*.attn.c_attn.bias": "qkv",
        "h.*.attn.c_proj.weight": "q width", "h.*.attn.c_proj.bias": "width", "h.*.mlp.c_fc.weight": "width neurons",
        "h.*.mlp.c_fc.bias": "neurons", "h.*.mlp.c_proj.weight": "neurons width", "h.*.mlp.c_proj.bias": "width",
    },
    fields={"layers": "n_layer", "width": "n_embd", "heads": "n_head", "neurons": "n_inner"},
    norms=("ln_1", "ln_2", "ln_f"),
    off={"attention": {"attn": "zero", "ln_1": "same"}, "mlp": {"mlp": "zero", "ln_2": "same"}},
)  # fmt: skip

_BERT = Family(
    name="bert",
    types=frozenset({"bert", "roberta", "xlm-roberta"}), layers="encoder.layer",
    parts={
        "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value",
        "o": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense",
    },
    modules={"attention": "attention.self", "mlp": "intermediate"}, head="attention.self",
    axes={
        "embeddings.?_embeddings.weight": "- width", "embeddings.LayerNorm.?": "width",
        **_inside("encoder.layer.*", {
            **_linear("attention.self.query", "q", "width"), **_linear("attention.self.key", "q", "width"),
            **_linear("attention.self.value", "q", "width"), **_linear("attention.output.dense", "width", "q"),
            "attention.output.LayerNorm.?": "width", **_linear("intermediate.dense", "neurons", "width"),
            **_linear("output.dense", "width", "neurons"), "output.LayerNorm.?": "width",
        }),
        **_linear("pooler.dense", "width", "width"), **_linear("classifier", "-", "width"),
        **_linear("cls.predictions.transform.dense", "width", "width"),
        "cls.predictions.transform.LayerNorm.?": "width", "cls.predictions.decoder.weight": "- width",
        "cls.predictions.decoder.bias": "-", "cls.predictions.bias": "-",
    },
    fields={k: v for k, v in _FIELDS.items() if k not in ("kv_heads", "head_dim")}, causal=False,
    norms=("LayerNorm",),
    off={
        "attention": {"attention.self": "zero", "attention.output.dense": "zero"},
        "mlp": {"intermediate": "zero", "output.dense": "zero"},
    },
)  # fmt: skip

_VIT = Family(
    name="vit",
    types=frozenset({"vit"}), layers="layers", parts=_VIT_PARTS,
    modules={"attention": "attention", "mlp": "mlp"}, head="attention", narrows="head_dim",
    axes={**_VIT_EMBEDDINGS, **_inside("layers.*", {**_attention("attention"), **_FC, "layernorm_?": "width"})},
    fields={k: v for k, v in _FIELDS.items() if k != "kv_heads"}, causal=False,
    norms=("layernorm_before", "layernorm_after", "layernorm"),
    off={
        "attention": {"attention": "zero", "layernorm_before": "same"},
        "mlp": {"mlp": "zero", "layernorm_after": "same"},
    },
)  # fmt: skip

_DINOV2 = replace(
    _VIT,
    name="dinov2",
    types=frozenset({"dinov2"}),
    layers="encoder.layer",
    axes={
        **_VIT_EMBEDDINGS,
        **_inside("encoder.layer.*", {
            **_attention("attention"), **_FC, "norm1.?": "width", "norm2.?": "width", "layer_scale?.lambda1": "width",
        }),
    },
    fields={k: v for k, v in _FIELDS.items() if k not in ("kv_heads", "neurons")} | {"neurons": "mlp_ratio"},
    norms=("norm1", "norm2", "layernorm"),
    off={
        "attention": {"attention": "zero", "norm1": "same", "layer_scale1": "same"},
        "mlp": {"mlp": "zero", "norm2": "same", "layer_scale2": "same"},
    },
)  # fmt: skip

_DINOV2_NESTED = replace(  # as transformers had it before 5.18
    _DINOV2,
    parts={
        **{x: f"attention.attention.{name}" for x, name in (("q", "query"), ("k", "key"), ("v", "value"))},
        "o": "attention.output.dense", "up": "mlp.fc1", "down": "mlp.fc2",
    },
    head="attention.attention", narrows="attention_head_size",
    axes={
        **_DINOV2.axes,
        **_inside("encoder.layer.*.attention", {
            **_linear("attention.query", "q", "width"), **_linear("attention.key", "q", "width"),
            **_linear("attention.value", "q", "width"), **_linear("output.dense", "width", "q"),
        }),
    },
)  # fmt: skip

FAMILIES = (_LLAMA, _GEMMA1, _GEMMA, _GPT2, _BERT, _VIT, _DINOV2, _DINOV2_NESTED)


def families_of(model_type: str) -> tuple[Family, ...]:
    """The axis maps for a ``model_type``; several where its modules had other names in earlier versions.

    Raises:
        UserError: there is none.
    """
    if found := tuple(family for family in FAMILIES if model_type in family.types):
        return found
    known = ", ".join(sorted(kind for family in FAMILIES for kind in family.types))
    raise UserError(f"nothing is known of how models of type {model_type} are cut; known are {known}")
