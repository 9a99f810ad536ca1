# SPDX-License-Identifier: Apache-2.0
"""The gates of a model: a small causal attention in front of each layer that says which tokens it remembers.

Legend: B batch, T new tokens, S all tokens so far, D width of the model, Hkv key/value heads, H' heads and d' channels
of the gate's own attention.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...attention import reference
from ...attention.causal import causal_tail
from ...errors import UserError

if TYPE_CHECKING:
    from ...call import Site

__all__ = ["Gate", "Gates"]

_FORMAT = 1
_WEIGHTS, _CONFIG = "gates.safetensors", "gates.json"
HOW = "python -m manyheads.recipes.attention_gate --model MODEL --out FOLDER"


class Gate(nn.Module):
    """Causal attention of H' heads over the layer's inputs, and a linear layer to one logit for each key/value head.

    A token's own value is added to what its attention gives: with no training attention is an average over all that was
    read, in which the token itself is hardly seen.

    Args:
        dim: D.
        kv_heads: Hkv.
        num_heads: H'.
        head_dim: d'.
        bias: of every logit at the start; above 0 everything is kept.
    """

    def __init__(self, dim: int, kv_heads: int, num_heads: int = 2, head_dim: int = 16, bias: float = 2.0) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * head_dim, bias=False)
        self.out = nn.Linear(num_heads * head_dim, kv_heads)
        nn.init.normal_(self.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.out.weight, std=0.02)
        nn.init.constant_(self.out.bias, bias)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``[B, H', T, d']`` of ``hidden [B, T, D]``, in its dtype."""
        x = reference.widened(hidden)
        projected: Tensor = self.qkv(x.to(self.qkv.weight.dtype))
        parts = projected.to(hidden.dtype).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def decide(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits ``[B, Hkv, T]`` of the last T tokens.

        Args:
            q: ``[B, H', T, d']``.
            k, v: ``[B, H', S, d']``.
            real: which of the S tokens are none of padding, bool ``[B, S]``; None for all.
        """
        q, k, v = (reference.widened(x) for x in (q, k, v))
        new, size, scale = q.shape[2], k.shape[2], self.head_dim**-0.5
        if real is None:
            out = causal_tail(q, k, v, scale)
        else:
            mask = reference.causal_mask(new, size, q.device) & real[:, None]
            own = torch.arange(size - new, size, device=q.device)[:, None] == torch.arange(size, device=q.device)
            mask = (mask | own)[:, None]  # padding sees itself: no row is empty
            out = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)
        out = out + v[:, :, size - new :].transpose(1, 2)
        logits: Tensor = self.out(out.flatten(2).to(self.out.weight.dtype))
        return logits.transpose(1, 2)

    def forward(self, hidden: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits ``[B, Hkv, T]`` of a whole text ``hidden [B, T, D]``; ``real [B, T]`` as in :meth:`decide`."""
        return self.decide(*self.project(hidden), real)


class Gates(nn.Module):
    """The gates of a model by layer, and what they were trained for.

    Args:
        dim: D.
        kv_heads: Hkv of each layer that has a gate.
        num_heads, head_dim, bias: as in :class:`Gate`.
        threshold: probability above which a token is kept.
        sinks: first tokens that are kept whatever the gates say.
        about: how they were trained, plain values.
    """

    def __init__(
        self, dim: int, kv_heads: Mapping[int, int], num_heads: int = 2, head_dim: int = 16, bias: float = 2.0,
        threshold: float = 0.5, sinks: int = 0, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config: dict[str, Any] = {"dim": dim, "num_heads": num_heads, "head_dim": head_dim}
        self.kv_heads, self.threshold, self.sinks, self.about = dict(kv_heads), threshold, sinks, dict(about or {})
        self.layers = nn.ModuleDict({
            str(layer): Gate(dim, heads, num_heads, head_dim, bias) for layer, heads in sorted(kv_heads.items())
        })  # fmt: skip
        self._placed: dict[tuple[Any, ...], Gate] = {}

    @classmethod
    def of(cls, dim: int, sites: Iterable[Site], **settings: Any) -> Gates:
        """New gates for ``sites`` of a model of width ``dim``; ``settings`` as in the class.

        Raises:
            UserError: no causal self-attention that caches keys and values is among them.
        """
        heads = {
            site.layer: site.num_kv_heads
            for site in sites
            if site.kind == "self" and site.causal and site.latent is None
        }
        known = {layer: count for layer, count in heads.items() if layer is not None and count is not None}
        if not known:
            raise UserError("attention_gate finds no layer that caches keys and values: give a decoder of transformers")
        return cls(dim, known, **settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gates:
        return self  # of the model, not of a sequence whose cache is copied

    def gate(self, layer: int) -> Gate:
        """The gate of a layer, the very module that is trained."""
        found = self.layers[str(layer)]
        assert isinstance(found, Gate)
        return found

    def placed(self, layer: int, like: Tensor) -> Gate:
        """The gate of a layer on the device of ``like``, in float32 or, where that has it, float64; for inference."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = layer, like.device, dtype
        if key not in self._placed:
            own, heads = self.gate(layer), self.kv_heads[layer]
            made = Gate(self.config["dim"], heads, self.config["num_heads"], self.config["head_dim"])
            made.load_state_dict(own.state_dict())
            self._placed[key] = made.requires_grad_(False).to(like.device, dtype)
        return self._placed[key]

    def save(self, folder: str | Path) -> Path:
        """Write ``gates.safetensors`` and ``gates.json`` into ``folder``, which ``attention_gate:gates=`` takes."""
        place = Path(folder).expanduser()
        place.mkdir(parents=True, exist_ok=True)
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        save_file(tensors, place / _WEIGHTS)
        config = {
            "format": _FORMAT, **self.config, "threshold": self.threshold, "sinks": self.sinks,
            "kv_heads": {str(layer): heads for layer, heads in self.kv_heads.items()}, "about": self.about,
        }  # fmt: skip
        (place / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        return place

    @staticmethod
    def load(folder: str | Path) -> Gates:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the folder does not hold gates.
        """
        place = Path(folder).expanduser()
        try:
            config = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
            if config["format"] != _FORMAT:
                raise ValueError(f"its format is {config['format']}, not {_FORMAT}")
            made = Gates(
                config["dim"], {int(layer): heads for layer, heads in config["kv_heads"].items()}, config["num_heads"],
                config["head_dim"], threshold=config["threshold"], sinks=config["sinks"], about=config["about"],
            )  # fmt: skip
            made.load_state_dict(load_file(place / _WEIGHTS))
        except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip("'\"").splitlines()[0]
            raise UserError(f"{folder} holds no gates ({reason}); train some: {HOW}") from None
        return made.requires_grad_(False).eval()
