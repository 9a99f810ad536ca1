# SPDX-License-Identifier: Apache-2.0
"""What is trained: the embeddings of gists, projections of their own, and LoRA on the model.

Legend: D width of the model, N x K weight of a linear layer, R rank.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...call import Piece, Site
from ...calls.low_rank import LowRank, parameter_name
from ...calls.trained import load_trained, save_trained
from ...errors import UserError
from .segments import Columns, Segments

__all__ = ["HOW", "GistPiece", "Gists", "check_site"]

_FILES = "gists"
HOW = "python -m manyheads.recipes.gist --model MODEL --out FOLDER"


@dataclass(slots=True)
class GistPiece(Piece):
    """A forward over T tokens and G gists behind them.

    Attributes:
        columns: of both.
        closes: whether its segment is whole: only the gists stay of it.
        keys: of the gists, not rotated, by layer, ``[B, Hkv, G, d]``; gathered in a whole text.
        values: theirs.
    """

    columns: Columns | None = None
    closes: bool = False
    keys: dict[int, Tensor] | None = None
    values: dict[int, Tensor] | None = None


class _Now(threading.local):
    """What this thread reads: the piece under way; the plain model where it is switched off."""

    piece: GistPiece | None = None
    off: bool = False


class Gists(LowRank):
    """The gists of a model.

    A linear layer computes ``W x + alpha B A x`` for every token, and for gists, where they have projections of their
    own, ``own x`` more. All begin at zero: untrained, a gist is a token with the embedding it was given.

    Args:
        segments: their geometry.
        embedding: ``[1, D]``, or ``[t, D]`` where each gist of a segment has one of its own.
        layers: ``[N, K]`` of each linear layer that is changed, by module path.
        own: names of the layers, as ``q_proj``, in which gists have projections of their own.
        lora: rank R, 0 for none.
        alpha: factor of LoRA.
        about: how they were trained, plain values.
    """

    def __init__(
        self, segments: Segments, embedding: Tensor, layers: Mapping[str, tuple[int, int]], own: Iterable[str] = (),
        lora: int = 0, alpha: float = 2.0, about: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(layers, lora, alpha)
        self.segments, self.own, self.about = segments, tuple(own), dict(about or {})
        self.embedding = nn.Parameter(embedding.detach().float().clone())
        self.projections = nn.ParameterDict()
        for name, (n, k) in self.layers.items():
            if name.rpartition(".")[2] in self.own:
                self.projections[parameter_name(name)] = nn.Parameter(torch.zeros(n, k))
        self.now = _Now()

    def __deepcopy__(self, memo: dict[int, Any]) -> Gists:
        return self  # of the model, not of a sequence whose cache is copied

    def compute(self, weight: Tensor, bias: Tensor | None, name: str, how: str = HOW) -> Callable[[Tensor], Tensor]:
        """What a linear layer computes; with the parameters as they are now, unless they are being trained.

        Raises:
            UserError: in the model at hand it has another shape.
        """
        self.check_shape(weight, name, how)
        live, own = self.embedding.requires_grad, self.projections.get(parameter_name(name))
        own = own if live or own is None else own.to(weight.device, weight.dtype)
        down, up = self.matrices(name, weight, live)

        def forward(x: Tensor) -> Tensor:
            out, piece = linear(x, weight, bias), self.now.piece
            if piece is None or self.now.off:
                return out
            if down is not None and up is not None:
                out = out + self.change(x, down, up)
            if own is None or piece.given == x.shape[1]:
                return out
            mine = out[:, piece.given :] + linear(
                x[:, piece.given :], own.to(x.dtype)
            )  # summed first, bfloat16 loses it
            return torch.cat([out[:, : piece.given], mine], 1)

        return forward

    def embedded(self, columns: Columns, like: Tensor) -> Tensor:
        """Embeddings of gists ``[B, G, D]``, as ``like [B, T, D]``."""
        table, number = self.embedding, torch.zeros_like(columns.segment)
        if len(table) > 1:
            number = torch.arange(len(number), device=number.device) % len(table)
        return table.to(like.device).index_select(0, number).to(like.dtype).expand(like.shape[0], -1, -1)

    def check(self, embeds: Tensor) -> None:
        """Raise UserError where the model is wider or narrower."""
        if (width := self.embedding.shape[-1]) != embeds.shape[-1]:
            raise UserError(f"these gists are {width} wide and the model is {embeds.shape[-1]}: train on it: {HOW}")

    def save(self, folder: str | Path) -> Path:
        """Write ``gists.safetensors`` (bfloat16) and ``gists.json`` into ``folder``, which ``gist:gists=`` takes."""
        config = {
            "segments": asdict(self.segments), "embedding": list(self.embedding.shape), "layers": self.layers,
            "own": self.own, "lora": self.lora, "alpha": self.alpha, "about": self.about,
        }  # fmt: skip
        return save_trained(folder, _FILES, {name: x.bfloat16() for name, x in self.state_dict().items()}, config)

    @staticmethod
    def load(folder: str | Path) -> Gists:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the folder does not hold gists.
        """

        def make(config: dict[str, Any]) -> Gists:
            segments, embedding = Segments(**config.pop("segments")), torch.zeros(config.pop("embedding"))
            config["layers"] = {name: tuple(shape) for name, shape in config["layers"].items()}
            return Gists(segments, embedding, **config)

        return load_trained(folder, _FILES, make, "gists", HOW)


def check_site(site: Site) -> None:
    """Raise UserError for a layer that gists do not know."""
    if site.latent is not None or site.window is not None:
        what = "caches latents" if site.latent is not None else f"has a window of {site.window} tokens"
        raise UserError(f"{site.name} {what}, which gist does not know: use a model with full attention in all layers")
