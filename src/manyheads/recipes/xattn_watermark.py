# SPDX-License-Identifier: Apache-2.0
"""Layers that hide a message and the extractor that reads it, for ``xattn_watermark``, trained on a frozen model.

    python -m manyheads.recipes.xattn_watermark --model MODEL --out FOLDER [--bits 8] [--place within] [--no-edits]

Layers and extractor are trained together on tokens drawn behind ordinary text, see
:mod:`manyheads.decoding.xattn_watermark`; then the extractor goes on with texts that the watermarked model wrote. The
same command goes on with a training that was cut off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

import manyheads
from manyheads.attention import reference
from manyheads.call import Site
from manyheads.decoding.xattn_watermark import EDITS, Embedder, Extractor, Substituted, XattnWatermark
from manyheads.decoding.xattn_watermark.edits import origins
from manyheads.decoding.xattn_watermark.embedder import Place
from manyheads.decoding.xattn_watermark.extractor import token_table
from manyheads.decoding.xattn_watermark.losses import Lesson, distortion, drawn, message_loss
from manyheads.integrations.decoding import processor
from manyheads.integrations.transformers import find_sites
from manyheads.recipes._adapters import add_options, frozen, run_training
from manyheads.spec import parse
from manyheads.strategy import Residual
from manyheads.training import Budget, Checkpoint, TrainState, decay, fit

__all__ = ["Trained", "new_watermark", "train_watermark", "written"]

_PROMPT = 8  # tokens that texts for the extractor are written on
_RATE = 0.3  # of edits in training, at most
_FREE, _LOWERING = 1.0, 0.7  # nats per token that are free at first, and the part of the training until they are not
OnStep = Callable[[TrainState, dict[str, float]], bool | None]


@dataclass
class Trained:
    """What a training makes."""

    embedder: Embedder
    extractor: Extractor
    about: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> Path:
        """Write both into ``folder``, which ``xattn_watermark:weights=`` takes."""
        self.embedder.about = self.extractor.about = self.about
        self.embedder.save(folder)
        return self.extractor.save(folder)

    def strategy(self, **more: Any) -> XattnWatermark | Substituted:
        """The strategy that hides messages with it."""
        kind = XattnWatermark if self.embedder.config["place"] == "between" else Substituted
        return kind(live=self.embedder, reader=self.extractor, **more)


def new_watermark(
    model: nn.Module, bits: int, *, place: Place = "between", width: int = 128, every: int = 3, uniform: bool = False,
    channels: int = 256, dim: int = 128, seed: int = 0,
) -> Trained:  # fmt: skip
    """Untrained layers and extractor for ``model``, on its device.

    Args:
        model: a decoder of transformers.
        bits: of a message.
        place, width, uniform: of the layers.
        every: one layer in so many blocks of the upper half.
        channels, dim: of the extractor: of what it knows of a token, and its width.
        seed: of the first weights.
    """
    known: Any = model
    table = known.get_input_embeddings().weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedder = Embedder.of(
            known.config.get_text_config().hidden_size, [site for site, _ in find_sites(model)], bits=bits,
            width=width, every=every, place=place, uniform=uniform,
        )  # fmt: skip
        given = token_table(table, channels)
        extractor = Extractor(given.shape[0], given.shape[1], bits, dim)
    extractor.table.copy_(given)
    return Trained(embedder.to(table.device), extractor.to(table.device))


@dataclass(frozen=True, kw_only=True)
class _Sizes(Residual):
    """Sets each layer's ``size`` to the median size of the stream that its block leaves."""

    embedder: Embedder

    def residual(self, site: Site, hidden: Tensor, state: dict[str, Any]) -> Tensor:
        if site.layer in self.embedder.kv_heads:
            size: Any = self.embedder.layer(site.layer).size
            size.copy_(hidden.detach().float().square().mean(-1).sqrt().median())
        return hidden


class _Lessons:
    """Batches for the training: texts, messages and edits, by number."""

    def __init__(self, bits: int, edits: bool, seed: int, device: torch.device) -> None:
        self.bits, self.edits, self.seed, self.device = bits, edits, seed, device

    def __call__(
        self, ids: Tensor, number: int, times: int = 1, messages: Tensor | None = None, allowed: float = 0.0
    ) -> Lesson:  # fmt: skip
        """The lesson of texts ``ids [B, T]``, edited ``times`` over; foreign tokens are those of other places.

        Without ``messages`` a text stands there twice, with a message and with its complement, so that what differs is
        the message.
        """
        rng = np.random.default_rng((self.seed, number % 2**32))
        if messages is None:
            half = torch.from_numpy(rng.integers(2, size=((len(ids) + 1) // 2, self.bits))).float()
            ids, messages = torch.cat([ids[: len(half)]] * 2)[: len(ids)], torch.cat([half, 1 - half])[: len(ids)]
        rows, length = times * len(ids), ids.shape[1]
        source = np.zeros((rows, length), np.int64)
        real = np.zeros((rows, length), bool)
        for row in range(rows):
            edit = EDITS[rng.integers(len(EDITS))] if self.edits else "none"
            cuts = np.unique([0, *rng.integers(1, length, 4), length])
            parts = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
            places = origins(length, edit, float(rng.uniform(0, _RATE)), rng, parts)[:length]
            source[row, : len(places)], real[row, : len(places)] = places, True
        foreign = ids.flatten()[torch.from_numpy(rng.integers(ids.numel(), size=(rows, length))).to(ids.device)]
        return Lesson(
            ids, messages.to(self.device), torch.from_numpy(source).to(self.device), foreign,
            torch.from_numpy(real).to(self.device), torch.tensor(allowed, device=self.device),
        )  # fmt: skip


def train_watermark(
    model: nn.Module, get_batch: Callable[[int], Tensor], *, bits: int = 8, place: Place = "between",
    edits: bool = True, uniform: bool = False, width: int = 128, every: int = 3, channels: int = 256, dim: int = 128,
    quality: float = 3.0, allowed: float = 0.2, temperature: float = 1.0, draws: int = 4,
    budget: Budget | str | int = "5m", lr: float = 4e-3, texts: int = 256, replayed: bool = False, seed: int = 0,
    checkpoint: Checkpoint | None = None, on_step: OnStep | None = None,
) -> Trained:  # fmt: skip
    """Layers and extractor for ``model``, which stays as it is.

    Args:
        model: a decoder of transformers, on its device.
        get_batch: ids ``[B, T + 1]`` by the number of the step.
        bits, place, uniform, width, every, channels, dim, seed: see :func:`new_watermark`.
        edits: the extractor reads edited texts.
        quality, allowed: price of a nat of KL divergence per token, and how many are free of it; a whole one at first,
            so that layers and extractor find each other.
        temperature: of the relaxed draws.
        draws: of a text at each step, each edited by itself.
        budget: of training both together, as in :func:`manyheads.training.fit`.
        lr: highest learning rate, of AdamW; gates have ten times it.
        texts: that the model writes for the extractor, which then trains on them half as long; 0 for none.
        replayed: record a step as a CUDA graph.
        checkpoint: where checkpoints go; training goes on from one.
        on_step: told the state and figures of the step: ``bce`` in nats per bit, ``right`` the share of bits that are,
            ``kl`` in nats per token; True ends it.
    """
    made = new_watermark(
        model, bits, place=place, width=width, every=every, uniform=uniform, channels=channels, dim=dim, seed=seed
    )
    embedder, extractor = made.embedder, made.extractor
    device = extractor.queries.device
    with torch.no_grad(), manyheads.use(model, _Sizes(embedder=embedder)):
        model(input_ids=get_batch(-1)[:, :-1], use_cache=False)
    lessons, seen = _Lessons(bits, edits, seed, device), dict[str, Tensor]()
    state = TrainState(Budget.of(budget))

    def logits(ids: Tensor) -> Tensor:
        length = ids.shape[1]
        # With a mask of its own the model does not wait for the device to ask whether texts are packed.
        mask = reference.causal_mask(length, length, device)[None, None]
        found: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found

    def loss(_: nn.Module, lesson: Lesson) -> Tensor:
        embedder.messages, embedder.off = lesson.messages, True
        with torch.no_grad():  # the second half of the rows are the first once more
            plain = logits(lesson.ids[: (len(lesson.ids) + 1) // 2]).repeat(2, 1, 1)[: len(lesson.ids)]
        embedder.off = False
        marked = logits(lesson.ids)
        kl = distortion(marked, plain).mean()
        bce, right = message_loss(extractor, drawn(marked, temperature, draws), lesson)
        seen.update(bce=bce.detach(), right=right, kl=kl.detach())
        return bce + quality * (kl - lesson.allowed).clamp(min=0)

    def lesson(number: int) -> Lesson:
        left = max(0.0, 1 - state.progress / _LOWERING)
        return lessons(get_batch(number)[:, :-1], number, draws, allowed=allowed + left * max(0.0, _FREE - allowed))

    both = nn.ModuleDict({"embedder": embedder, "extractor": extractor})
    gates = [p for name, p in both.named_parameters() if name.endswith("gate")]
    others = [p for name, p in both.named_parameters() if not name.endswith("gate")]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": gates, "lr": 10 * lr}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    with frozen(model):
        with manyheads.use(model, made.strategy()):
            fit(
                both, lesson, loss, budget=state, optimizers=[optimizer],
                checkpoint=checkpoint, replayed=replayed, schedule=decay("cosine", warmup=0.1, floor=0.1),
                on_step=None if on_step is None else lambda now: on_step(now, {k: float(x) for k, x in seen.items()}),
            )  # fmt: skip
        embedder.requires_grad_(False)
        embedder.messages = None
        about = {name: round(float(x), 4) for name, x in seen.items()}
        if texts:
            _read_written(model, made, get_batch, lessons, texts, state.step // 2, lr / 2, replayed)
    made.about = {"model": type(model).__name__, "bits": bits, "edits": edits, "steps": state.step, **about}
    extractor.requires_grad_(False)
    return made


def _read_written(
    model: nn.Module, made: Trained, get_batch: Callable[[int], Tensor], lessons: _Lessons, texts: int, steps: int,
    lr: float, replayed: bool,
) -> None:  # fmt: skip
    """Train the extractor on texts that the watermarked model writes."""
    first = get_batch(-2)
    batch, length = len(first), first.shape[1] - 1
    prompts = torch.cat([first, *(get_batch(-3 - i) for i in range((texts - 1) // batch))])[:texts, :_PROMPT]
    rng = np.random.default_rng((lessons.seed, 1))
    messages = torch.from_numpy(rng.integers(2, size=(len(prompts), lessons.bits))).float().to(prompts.device)
    every = written(model, made.strategy(rows=messages), prompts, length, seed=lessons.seed)

    def lesson(number: int) -> Lesson:
        rows = np.random.default_rng((lessons.seed, number, 2)).permutation(len(every))[:batch]
        chosen = torch.from_numpy(rows).to(every.device)
        return lessons(every[chosen], number, messages=messages[chosen])

    fit(
        made.extractor, lesson, lambda _, given: message_loss(made.extractor, given.ids, given)[0],
        budget=max(1, steps), optimizers=[torch.optim.AdamW(made.extractor.parameters(), lr=lr, weight_decay=0.01)],
        replayed=replayed, schedule=decay("cosine", warmup=0.1, floor=0.1),
    )  # fmt: skip


def written(model: Any, strategy: Any, ids: Tensor, most: int, *, seed: int = 0, chooser: Any = None) -> Tensor:
    """Texts ``[B, most]`` drawn behind prompts ``ids [B, T]``; none ends before.

    Args:
        model: a decoder of transformers.
        strategy: what acts on the model; None for nothing.
        ids, most, seed: prompts, tokens of a text, and of the draws.
        chooser: how tokens are chosen, a :class:`manyheads.writing.TokenChoice`; plain sampling if None.
    """
    choice: Any = parse("sampling") if chooser is None else chooser
    given = processor(choice, seed)
    with torch.inference_mode(), manyheads.use(model, *([] if strategy is None else [strategy])):
        found: Tensor = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=[given], max_new_tokens=most,
            min_new_tokens=most, do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return found[:, ids.shape[1] :].clone()


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.xattn_watermark", description="Train layers that hide a message, and its reader."
    )
    add_options(parser, of="watermark", lr=4e-3)
    parser.set_defaults(length=128, batch=16)
    parser.add_argument("--bits", type=int, default=8, help="of a message")
    parser.add_argument("--place", choices=get_args(Place), default="between", help="of the layers: blocks or in them")
    parser.add_argument("--no-edits", action="store_true", help="train on texts as they are written alone")
    parser.add_argument("--allowed", type=float, default=0.2, help="KL divergence that costs nothing, nats per token")
    args = parser.parse_args(arguments)
    if (args.out / "embedder.json").exists():
        parser.error(f"{args.out} holds a watermark; name a new folder")
    return run_training(
        args,
        lambda model, get_batch, line, checkpoint: train_watermark(
            model, get_batch, bits=args.bits, place=args.place, edits=not args.no_edits, allowed=args.allowed,
            budget=args.budget, lr=args.lr, seed=args.seed, checkpoint=checkpoint,
            on_step=lambda state, seen: line(state, f"{seen['right']:.0%} of bits at {seen['kl']:.3f} nats"),
        ),
        lambda made: f"use it as {made.strategy().slug}:weights={args.out},message={'10' * args.bits:.{args.bits}}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
