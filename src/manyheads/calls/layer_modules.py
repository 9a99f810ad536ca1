# SPDX-License-Identifier: Apache-2.0
"""Small trained modules, one for each layer of a model, that read what its attention reads; and a folder of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..errors import UserError
from .trained import load_trained, save_trained

if TYPE_CHECKING:
    from ..call import AttentionCall, Site

__all__ = ["LayerModules"]


class LayerModules(nn.Module):
    """Base: the modules of a model by layer, and how they were trained.

    Attributes:
        files: the weights are in ``files.safetensors``, the rest in ``files.json``.
        what: the modules in an error, ``gates``.
        how: the command that trains some.
        user: the strategy that they are for.

    Args:
        kv_heads: Hkv of each layer that has a module.
        config: sizes of a module, ``dim`` (the width D of the model) among them.
        about: how they were trained, plain values.
    """

    files: ClassVar[str]
    what: ClassVar[str]
    how: ClassVar[str]
    user: ClassVar[str]

    def __init__(
        self, kv_heads: Mapping[int, int], config: Mapping[str, Any], about: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config, self.kv_heads, self.about = dict(config), dict(kv_heads), dict(about or {})
        self.layers = nn.ModuleDict({str(n): self.make(heads, **more) for n, heads in sorted(kv_heads.items())})
        self._placed: dict[tuple[Any, ...], nn.Module] = {}

    @abstractmethod
    def make(self, heads: int, **more: Any) -> nn.Module:
        """A module for a layer of ``heads`` key/value heads, by :attr:`config`."""

    @property
    def described(self) -> dict[str, Any]:
        """What the class is made with again, beside ``kv_heads`` and ``about``."""
        return self.config

    @classmethod
    def of(cls, dim: int, sites: Iterable[Site], **settings: Any) -> Self:
        """New modules for ``sites`` of a model of width ``dim``; ``settings`` as in the class.

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
            raise UserError(f"{cls.user} finds no layer that caches keys and values: give a decoder of transformers")
        return cls(dim=dim, kv_heads=known, **settings)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # of the model, not of a sequence whose cache is copied

    def layer(self, layer: int) -> nn.Module:
        """The module of a layer, the very one that is trained."""
        return self.layers[str(layer)]

    def placed(self, layer: int, like: Tensor) -> Any:
        """The module of a layer on the device of ``like``, in float32 or, where that has it, float64; for inference."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        key = layer, like.device, dtype
        if key not in self._placed:
            made = self.make(self.kv_heads[layer])
            made.load_state_dict(self.layer(layer).state_dict())
            self._placed[key] = made.requires_grad_(False).eval().to(like.device, dtype)
        return self._placed[key]

    def reads(self, call: AttentionCall, folder: str) -> Tensor:
        """What the module of the call's layer reads, ``[B, T, D]``.

        Raises:
            UserError: the model does not pass it on, or has another width.
        """
        if call.hidden is None:
            raise UserError(f"{self.user} reads the input of {call.site.name}, which the model does not pass on")
        if call.hidden.shape[-1] != self.config["dim"]:
            raise UserError(
                f"{folder} has {self.what} for a width of {self.config['dim']}, and {call.site.name} has "
                f"{call.hidden.shape[-1]}: train {self.what} on this model"
            )
        return call.hidden

    def check(self, site: Site, folder: str) -> None:
        """Raise UserError where there is no module for ``site``."""
        if site.latent is not None:
            raise UserError(f"{site.name} caches latents, which are no heads to {self.user}; choose hedge or snapkv")
        if site.layer not in self.kv_heads or self.kv_heads[site.layer] != site.num_kv_heads:
            raise UserError(
                f"{folder} has no {self.what.removesuffix('s')} for layer {site.layer} with {site.num_kv_heads} "
                f"key/value heads: train {self.what} on this model: {self.how}"
            )

    def save(self, folder: str | Path) -> Path:
        """Write weights and settings into ``folder``, which the strategy takes."""
        kv_heads = {str(layer): heads for layer, heads in self.kv_heads.items()}
        config = {**self.described, "about": self.about, "kv_heads": kv_heads}
        return save_trained(folder, self.files, self.state_dict(), config)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the folder does not hold such modules.
        """
        return load_trained(folder, cls.files, cls._made, cls.what, cls.how)

    @classmethod
    def _made(cls, config: dict[str, Any]) -> Self:
        kv_heads = {int(layer): heads for layer, heads in config.pop("kv_heads").items()}
        return cls(kv_heads=kv_heads, **config)
