# SPDX-License-Identifier: Apache-2.0
"""Fit the codebooks of ``hcattention`` for a model on a text, once, and keep them as a safetensors file.

    python -m manyheads.recipes.hcattention --model path/or/name --text notes/ --out codebooks/
    manyheads.use(model, "hcattention:codebooks=codebooks/")

The model reads pieces of the text; the keys of every layer, after rotary positions, are gathered and cut into
sub-vectors, and k-means finds the centroids of each head and sub-vector. Rotary positions turn keys, so that pieces
should be as long as the contexts that will be read.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manyheads import models
from manyheads.attention import product_codes
from manyheads.caches._codebooks import write_codebooks
from manyheads.call import AttentionCall, Site
from manyheads.data import texts
from manyheads.errors import UserError
from manyheads.integrations import use
from manyheads.recipes import _card
from manyheads.spec import parse
from manyheads.strategy import AttentionWatch

__all__ = ["fit", "main"]


@dataclass(frozen=True, kw_only=True)
class _Keys(AttentionWatch):
    """Keys of the sites that ``hcattention`` acts on."""

    def selects(self, site: Site) -> bool:
        return parse("hcattention").selects(site)

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        del out
        call.state.setdefault("keys", []).append(call.k.detach())


def fit(
    model: nn.Module, rows: Sequence[Tensor], *, groups: int = 0, centroids: int = 256, iterations: int = 25,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[int, Tensor]:  # fmt: skip
    """Codebooks ``[Hkv, g, c, w]`` of each layer of a model.

    Args:
        model: a decoder-only transformers model, in evaluation mode.
        rows: token ids ``[1, L]`` to be read, each by itself.
        groups: sub-vectors of a key, 0 for one of two channels.
        centroids: of each codebook.
        iterations: of k-means.
        progress: receives a line for each layer.

    Raises:
        UserError: there are fewer tokens than centroids, or the model has no attention to act on.
    """
    if sum(row.shape[1] for row in rows) < centroids:
        raise UserError(f"{centroids} centroids need as many tokens at least: give more text")
    keys = _Keys()
    with torch.no_grad(), use(model, keys) as port:
        for row in rows:
            model(input_ids=row, use_cache=False)
    found = {}
    for site, state in port.kept(keys):
        assert site.layer is not None
        k = torch.cat(state.pop("keys"), 2)
        found[site.layer] = product_codes.fit(
            k, groups or max(1, k.shape[3] // 2), centroids, iterations=iterations, sample=k.shape[2]
        )[0]
        progress(f"{site.name}: {k.shape[2]:,} keys")
    return found


def _pieces(tokenizer: Any, given: Sequence[str], length: int, most: int) -> list[Tensor]:
    """Pieces of ``length`` tokens of the texts, ``most`` tokens at most, spread over the texts."""
    found: list[Tensor] = []
    for text in texts.read(given):
        ids = torch.tensor([tokenizer.encode(text.content[: 8 * most], verbose=False)])
        found += [piece for piece in ids.split(length, 1) if piece.shape[1] == length or not found]
    step = max(1, len(found) * length // most)
    return found[::step][: max(1, most // length)]


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.hcattention", description="Fit codebooks of a model's keys on a text."
    )
    parser.add_argument("--model", help="folder or name; the shipped model when not given")
    parser.add_argument("--text", nargs="+", required=True, help="files, folders, or texts by name (prose, code, ...)")
    parser.add_argument("--out", required=True, help="folder of the codebooks")
    parser.add_argument("--groups", type=int, default=0, help="sub-vectors of a key, 0 for one of two channels")
    parser.add_argument("--centroids", type=int, default=256, help="of each codebook")
    parser.add_argument("--iterations", type=int, default=25, help="of k-means")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a piece")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens in all")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    try:
        model, tokenizer = models.load(given.model, given.device) if given.model else models.load_default(given.device)
        rows = _pieces(tokenizer, given.text, given.length, given.tokens)
        books = fit(
            model, [row.to(model.device) for row in rows], groups=given.groups, centroids=given.centroids,
            iterations=given.iterations, progress=print,
        )  # fmt: skip
        about = {
            "model": given.model or "default", "text": given.text, "length": given.length,
            "tokens": sum(row.shape[1] for row in rows), "centroids": given.centroids,
            "iterations": given.iterations, "environment": _card.environment(model.device.type),
        }  # fmt: skip
        print(f"written to {write_codebooks(given.out, books, about)}")
    except UserError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
