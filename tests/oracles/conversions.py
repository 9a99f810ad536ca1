# SPDX-License-Identifier: Apache-2.0
"""What every conversion must hold: the cut model is the masked one, and a file of it gives the same again.

The masked model is the model before, whose heads, neurons and channels that go are held at zero by hooks; norms of the
residual stream are computed over the channels that stay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as t
from torch import Tensor

from manyheads.conversion import Drop, Prune, SurgeryPlan
from manyheads.integrations.anatomy import ModelAnatomy

LAYERS, WIDTH, HEADS, KV, DIM, NEURONS, WORDS = 3, 48, 6, 3, 8, 40, 61
_SHARED: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": NEURONS,
}  # fmt: skip
_DECODER = _SHARED | {
    "vocab_size": WORDS, "head_dim": DIM, "num_key_value_heads": KV, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma3", "gpt2", "bert", "vit", "dinov2")


def tiny(kind: str, **changed: Any) -> Any:
    """A random model in float64, in evaluation mode, none of whose parameters is zero or one."""
    if kind == "gpt2":
        own = {
            "vocab_size": WORDS, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64,
            "n_inner": NEURONS, "bos_token_id": 0, "eos_token_id": 1,
        }  # fmt: skip
        model: Any = t.GPT2LMHeadModel(t.GPT2Config(**own | changed))
    elif kind == "bert":
        model = t.BertModel(t.BertConfig(**_SHARED | {"vocab_size": WORDS} | changed))
    elif kind == "vit":
        model = t.ViTModel(t.ViTConfig(**_SHARED | {"image_size": 16, "patch_size": 8} | changed))
    elif kind == "dinov2":
        own = {k: v for k, v in _SHARED.items() if k != "intermediate_size"}
        model = t.Dinov2Model(t.Dinov2Config(**own | {"mlp_ratio": 1, "image_size": 28} | changed))
    else:
        config, made = {
            "llama": (t.LlamaConfig, t.LlamaForCausalLM), "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
            "qwen3": (t.Qwen3Config, t.Qwen3ForCausalLM), "gemma": (t.GemmaConfig, t.GemmaForCausalLM),
            "gemma3": (t.Gemma3TextConfig, t.Gemma3ForCausalLM),
        }[kind]  # fmt: skip
        own = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4}
        model = made(config(**_DECODER | (own if kind == "gemma3" else {}) | changed))
    source = torch.Generator().manual_seed(1)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=source, dtype=torch.float64)
    return model


@contextmanager
def masked(model: Any, plan: SurgeryPlan, over_all: bool = False) -> Iterator[Any]:
    """The model with what ``plan`` prunes and drops held at zero; ``over_all`` is wrong: norms over all."""
    anatomy, handles = ModelAnatomy(model), []

    def on_input(module: Any, keep: Tensor) -> None:
        handles.append(module.register_forward_pre_hook(lambda _, args: (args[0] * keep, *args[1:])))

    def on_output(module: Any, change: Any) -> None:
        handles.append(module.register_forward_hook(change))

    for step in plan.steps:
        layers = range(len(anatomy.layers)) if getattr(step, "layer", None) is None else (step.layer,)
        if isinstance(step, Prune) and step.axis in ("heads", "neurons"):
            for layer in layers:
                shape = anatomy.layers[layer]
                keep = torch.zeros(shape.heads if step.axis == "heads" else shape.neurons, dtype=torch.float64)
                keep[list(step.keep)] = 1
                if step.axis == "heads":
                    keep = keep.repeat_interleave(shape.head_dim)
                on_input(anatomy.linear("o" if step.axis == "heads" else "down", layer), keep)
        elif isinstance(step, Prune):
            keep = torch.zeros(anatomy.width, dtype=torch.float64)
            keep[list(step.keep)] = 1
            embedding = model.get_submodule("embeddings") if anatomy.family in ("vit", "dinov2", "bert") else None
            on_output(embedding or model.get_input_embeddings(), lambda _, args, out, k=keep: out * k)
            if anatomy.family == "gpt2":
                on_output(model.transformer.wpe, lambda _, args, out, k=keep: out * k)
            for layer in layers:
                for part in ("o", "down"):
                    on_output(anatomy.linear(part, layer), lambda _, args, out, k=keep: out * k)
            for name, norm in model.named_modules():
                if not over_all and name.rpartition(".")[2] in anatomy.map.norms + _POST:
                    on_output(norm, lambda module, args, out, k=keep: _normed(module, args[0] * k, k))
        elif isinstance(step, Drop):
            for layer in step.layers:
                block = anatomy.blocks[layer]
                if step.part == "block":
                    on_output(block, lambda _, args, out: args[0])
                else:
                    part = anatomy.linear("o" if step.part == "attention" else "down", layer)
                    on_output(part, lambda _, args, out: torch.zeros_like(out))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


_POST = ("post_attention_layernorm", "post_feedforward_layernorm")


def _normed(norm: Any, x: Tensor, keep: Tensor) -> Tensor:
    """A norm over the channels that stay, of ``x`` that is zero elsewhere."""
    count = keep.sum()
    if isinstance(norm, torch.nn.LayerNorm):
        apart = (x - x.sum(-1, keepdim=True) / count) * keep
        scale = (apart.square().sum(-1, keepdim=True) / count + norm.eps).rsqrt()
        return (apart * scale * norm.weight + norm.bias) * keep
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    gain = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
    return x * (x.square().sum(-1, keepdim=True) / count + eps).rsqrt() * gain * keep
