# SPDX-License-Identifier: Apache-2.0
"""Blocks as one sequence of tokens and positions each: every row's whole view is built anew for every forward.

Keys are kept unturned and turned to the positions of each view; nothing is shared, and attention is the model's own.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from manyheads.attention.rope import rotate, unrotate


def exact(model):
    """``model`` in float64 throughout: transformers computes norms and rotary tables in float32."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
            eps = getattr(module, "variance_epsilon", None) or module.eps
            module.forward = lambda x, gain=gain, eps=eps: x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * gain
    model.model.rotary_emb = (Typed if hasattr(model.config, "query_pre_attn_scalar") else Plain)(
        model.model.rotary_emb
    )
    return model.eval()


def tables(frequencies, x, positions):
    angles = positions[..., None].double() * frequencies.double()
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Plain(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x, position_ids):
        return tables(self.own.inv_freq, x, position_ids)


class Typed(Plain):
    def forward(self, x, position_ids, layer_type):
        return tables(getattr(self.own, f"{layer_type}_inv_freq"), x, position_ids)


class Layer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, serial, index):
        super().__init__()
        self.serial, self.index, self.raw = serial, index, {}

    def lazy_initialization(self, *_):
        pass

    def get_seq_length(self):
        return 0

    def get_max_length(self):
        return -1

    def get_mask_sizes(self, count):
        return count, 0

    def update(self, k, v, *_, **__):
        serial, keys, values = self.serial, [], []
        k = unrotate(k, serial.tables(self.index, serial.places))
        old = {name: pair[0].shape[2] for name, pair in self.raw.items()}
        for row, (view, tokens) in enumerate(serial.rows):
            new = [x[row : row + 1, :, -len(tokens) :] for x in (k, v)]
            held = self.raw.get(view[-1])
            self.raw[view[-1]] = (
                tuple(torch.cat([a, b], 2) for a, b in zip(held, new, strict=True)) if held else tuple(new)
            )
        for view, _ in serial.rows:
            parts = [self.raw[name] for name in view[:-1] if name in self.raw]
            if not serial.same_step:
                some = [(name, old[name]) for name in view[:-1] if name in old]
                parts = [tuple(x[:, :, :n] for x in self.raw[name]) for name, n in some]
            key, value = (torch.cat([*(pair[i] for pair in parts), self.raw[view[-1]][i]], 2) for i in (0, 1))
            key = rotate(key, serial.tables(self.index, torch.arange(key.shape[2])[None]))
            pad = serial.width - key.shape[2]
            keys.append(nn.functional.pad(key, (0, 0, pad, 0)))
            values.append(nn.functional.pad(value, (0, 0, pad, 0)))
        return torch.cat(keys), torch.cat(values)


class Serial:
    """Blocks are names; ``read`` and ``move`` are those of ``SharedBlocks``."""

    def __init__(self, model, wrong_window=0):
        self.model, self.wrong_window = model, wrong_window
        self.cache = Cache(layers=[Layer(self, i) for i in range(model.config.num_hidden_layers)])

    def tables(self, index, positions):
        kinds = (self.model.config.layer_types[index],) if isinstance(self.model.model.rotary_emb, Typed) else ()
        return self.model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), positions, *kinds)

    def length(self, name):
        raw = self.cache.layers[0].raw
        return raw[name][0].shape[2] if name in raw else 0

    def read(self, rows, same_step=True):
        self.rows, self.same_step = rows, same_step
        new = {view[-1]: len(tokens) for view, tokens in rows}
        totals = [
            sum(self.length(name) + (new.get(name, 0) if same_step or name == view[-1] else 0) for name in view)
            for view, _ in rows
        ]
        longest, self.width = max(map(len, (tokens for _, tokens in rows))), max(totals)
        ids = torch.tensor([[0] * (longest - len(tokens)) + list(tokens) for _, tokens in rows])
        ends = torch.tensor(totals)[:, None]
        self.places = (ends - longest + torch.arange(longest)).clamp(min=0)
        at = torch.arange(self.width) - (self.width - ends)  # [W, S]
        causal = (at[:, None] >= 0) & (at[:, None] <= self.places[..., None])
        window = (getattr(self.model.config, "sliding_window", None) or 10**6) + self.wrong_window
        sliding = causal & (at[:, None] > self.places[..., None] - window)
        mask = causal[:, None]
        if isinstance(self.model.model.rotary_emb, Typed):
            mask = {"full_attention": mask, "sliding_attention": sliding[:, None]}
        given = {"input_ids": ids, "position_ids": self.places, "attention_mask": mask, "past_key_values": self.cache}
        return self.model(**given).logits[:, -1]

    def move(self, source, target):
        for layer in self.cache.layers:
            parts = [layer.raw[target], layer.raw.pop(source)]
            layer.raw[target] = tuple(torch.cat([pair[i] for pair in parts], 2) for i in (0, 1))
