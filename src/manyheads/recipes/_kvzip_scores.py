# SPDX-License-Identifier: Apache-2.0
"""What the recipes of predicted scores share: KVzip's scores of a frozen model, and modules that learn them.

The model reads each piece of text, and reads it again behind an instruction to repeat it: what that attends to are the
scores. Of every piece some tokens are drawn, and the modules of all layers learn their scores from the hidden states.
On pieces that were not trained on it is then said how much of the scores is predicted (R^2), and at which threshold
which part of the tokens would stay.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manyheads
from manyheads import catalog
from manyheads.caches._predicted import Predictors
from manyheads.caches._view import CacheView
from manyheads.call import AttentionCall
from manyheads.data.texts import CORPORA
from manyheads.errors import UserError
from manyheads.experiment import CausalLM
from manyheads.integrations.cache import cache_arguments
from manyheads.integrations.transformers import find_sites, new_cache
from manyheads.strategy import AttentionWatch
from manyheads.training import decay, fit

from ._adapters import encoded, id_batches, texts

__all__ = ["Examples", "collect", "judged", "predicted", "run", "train_modules"]

_PARTS = (0.5, 0.25, 0.1)  # of the tokens, whose thresholds are noted
_HELD_OUT = 0.1  # of the pieces


@dataclass(frozen=True)
class Examples:
    """Tokens and their scores: hidden states ``[N, L, D]`` and scores ``[N, L, Hkv]`` of L layers, by number."""

    layers: tuple[int, ...]
    hidden: Tensor
    scores: Tensor


def _noting(found: dict[int, Tensor], **fields: Any) -> Any:
    """KVzip that notes its scores, ``[B, Hkv, N]`` by layer, in ``found``."""
    base: Any = catalog.load("kvzip")

    class Noted(base):  # type: ignore[misc]
        def rank(self, views: list[CacheView]) -> list[Tensor]:
            ranked: list[Tensor] = super().rank(views)
            found.update({view.site.layer or 0: x for view, x in zip(views, ranked, strict=True)})
            return ranked

    return Noted(**fields)


class _Inputs(AttentionWatch):
    """Notes what the attention of each layer reads in the first forward, ``[B, T, D]``."""

    found: dict[int, Tensor]

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        if call.hidden is None:
            raise UserError(f"the input of {call.site.name} is not known, from which scores would be predicted")
        self.found.setdefault(call.site.layer or 0, call.hidden.detach())


@torch.no_grad()
def collect(
    model: nn.Module, pieces: Sequence[Tensor], tokens: int, *, plus: bool, instruct: bool = True, seed: int = 0,
    said: Callable[[int], None] | None = None,
) -> Examples:  # fmt: skip
    """Hidden states and scores of ``tokens`` tokens, drawn without return, of each of ``pieces [B, T]``.

    Args:
        model: a decoder of transformers, in evaluation mode.
        pieces: ids, on its device.
        tokens: of a row.
        plus: KVzip+'s scores.
        instruct: as in KVzip.
        seed: of the draws.
        said: told the number of each piece that is done.
    """
    generator, hidden, scores = torch.Generator().manual_seed(seed), list[Tensor](), list[Tensor]()
    layers: tuple[int, ...] = ()
    for number, ids in enumerate(pieces):
        noted, inputs = dict[int, Tensor](), _Inputs()
        object.__setattr__(inputs, "found", {})
        policy = _noting(noted, plus=plus, instruct=instruct, budget=0.5)
        with manyheads.use(model, inputs):
            model(input_ids=ids, **cache_arguments(model, new_cache(model, policy)))
        layers = tuple(sorted(noted))
        for row in range(ids.shape[0]):
            drawn = policy.sinks + torch.randperm(ids.shape[1] - policy.sinks, generator=generator)[:tokens]
            at = drawn.to(ids.device)
            hidden.append(torch.stack([inputs.found[n][row, at] for n in layers], 1))
            scores.append(torch.stack([noted[n][row][:, at].T for n in layers], 1).float())
        if said is not None:
            said(number)
    return Examples(layers, torch.cat(hidden), torch.cat(scores))


def predicted(modules: Predictors, examples: Examples) -> Tensor:
    """What ``modules`` say of the tokens, ``[N, L, Hkv]``."""
    by_layer = [modules.layer(n)(examples.hidden[None, :, i])[0].T for i, n in enumerate(examples.layers)]
    return torch.stack(by_layer, 1)


def train_modules(
    modules: Predictors, examples: Examples, *, steps: int = 2000, batch: int = 512, lr: float = 3e-3, seed: int = 0
) -> Predictors:  # fmt: skip
    """Train in place, all layers at once."""

    def get_batch(number: int) -> Examples:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        at = torch.randint(len(examples.hidden), (batch,), generator=generator).to(examples.hidden.device)
        return Examples(examples.layers, examples.hidden[at], examples.scores[at])

    def loss(_: nn.Module, drawn: Examples) -> Tensor:
        return modules.loss(predicted(modules, drawn), drawn.scores)

    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=0.01)
    fit(
        modules,
        get_batch,
        loss,
        budget=steps,
        optimizers=[optimizer],
        bf16=False,
        schedule=decay("cosine", warmup=0.05),
    )
    return modules.requires_grad_(False)


@torch.no_grad()
def judged(modules: Predictors, examples: Examples) -> dict[str, Any]:
    """R^2 of what is to be said of each layer and head, averaged, and thresholds by the part that is above."""
    found, wanted = predicted(modules, examples), modules.target(examples.scores)
    apart, spread = (found - wanted).square().mean(0), wanted.var(0, correction=0).clamp(min=1e-12)
    order = found.flatten().sort(descending=True).values
    return {
        "r2": float((1 - apart / spread).mean()),
        "thresholds": {f"{part:g}": float(order[round(part * (len(order) - 1))]) for part in _PARTS},
    }


def run(slug: str, kind: type[Predictors], own: Sequence[str], arguments: list[str] | None = None) -> int:
    """Run the recipe of a strategy: train ``kind``, of which the options ``own`` set sizes.

    Args:
        slug: of the strategy.
        kind: its modules.
        own: settings of ``kind`` that the command line takes, whole numbers.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(f"python -m manyheads.recipes.{slug}", description="Train what predicts scores.")
    parser.add_argument("--model", default="default", help="folder or hub name of a decoder; default: the shipped one")
    parser.add_argument("--out", type=Path, required=True, help="folder of the modules")
    parser.add_argument("--text", default="prose", help=f"{', '.join(CORPORA)}, or files and folders, comma-separated")
    parser.add_argument("--pieces", type=int, default=256, help="of text that are read twice")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a piece")
    parser.add_argument("--tokens", type=int, default=512, help="of a piece that are trained on")
    for name in own:
        parser.add_argument(f"--{name}", type=int, help="of each module")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    try:
        subject = CausalLM(args.model)
        subject.load(args.device)
        ids = encoded(texts(args.text), subject.tokenizer)
        get_batch = id_batches(ids, args.length, 1, args.seed, args.device)
        pieces = [get_batch(i)[:, :-1] for i in range(args.pieces)]

        def said(number: int) -> None:
            if number % 16 == 15:
                print(f"{number + 1} of {len(pieces)} pieces", flush=True)

        modules = _fresh(kind, subject.model, args.seed, {name: vars(args)[name] for name in own}).to(args.device)
        found = collect(subject.model, pieces, args.tokens, plus=kind.plus, seed=args.seed, said=said)
        cut = len(found.hidden) * (args.pieces - max(1, round(_HELD_OUT * args.pieces))) // args.pieces
        parts = [Examples(found.layers, found.hidden[at], found.scores[at]) for at in (slice(cut), slice(cut, None))]
        train_modules(modules, parts[0], steps=args.steps, lr=args.lr, seed=args.seed)
        modules.about = {
            "model": type(subject.model).__name__, "text": args.text, "pieces": args.pieces, "steps": args.steps,
            **judged(modules, parts[1]),
        }  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    modules.save(args.out)
    about = modules.about
    print(f"{args.out}: R^2 {about['r2']:.2f}; thresholds by the part of the tokens that stays: {about['thresholds']}")
    return 0


def _fresh(kind: type[Predictors], model: nn.Module, seed: int, sizes: dict[str, int | None]) -> Predictors:
    """Modules that are not trained yet, for the layers that KVzip scores."""
    config: Any = model.config
    sites = [site for site, _ in find_sites(model) if site.window is None]
    more: dict[str, Any] = {name: value for name, value in sizes.items() if value is not None}
    if "groups" in inspect.signature(kind).parameters:
        more["groups"] = min((site.num_heads or 1) // (site.num_kv_heads or 1) for site in sites)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind.of(config.get_text_config().hidden_size, sites, **more)
