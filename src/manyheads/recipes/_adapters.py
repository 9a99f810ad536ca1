# SPDX-License-Identifier: Apache-2.0
"""What recipes share that train something small on a frozen model: texts in batches, the model frozen, options."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from manyheads.data.texts import CORPORA, Text, corpus, read
from manyheads.errors import UserError
from manyheads.experiment import CausalLM
from manyheads.progress import time_left
from manyheads.training import Checkpoint, TrainState

__all__ = ["Line", "add_options", "encoded", "frozen", "id_batches", "run_training", "texts"]

_CHARACTERS = 4_000_000  # of the texts, at most
Line = Callable[[TrainState, str], None]  # shows how far a training is, every ten steps, and what is said of the step


class _Trained(Protocol):
    about: dict[str, Any]

    def save(self, folder: str | Path) -> Path: ...


T = TypeVar("T", bound=_Trained)


def add_options(parser: argparse.ArgumentParser, of: str, lr: float) -> None:
    """Options of a training of ``of`` on a model, at a highest rate of ``lr`` by default."""
    parser.add_argument("--model", default="default", help="folder or hub name of a decoder; default: the shipped one")
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the {of}; a training cut off goes on there")
    parser.add_argument("--text", default="prose", help=f"{', '.join(CORPORA)}, or files and folders, comma-separated")
    parser.add_argument("--budget", default="5m", help="as 5m, 90s, 2M (tokens) or '200 steps'")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--lr", type=float, default=lr, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def texts(given: str) -> list[Text]:
    """Texts by name, or of files and folders, comma-separated."""
    return corpus(given) if given in CORPORA else read([Path(part) for part in given.split(",")])


def encoded(given: Sequence[Text], tokenizer: Any) -> Tensor:
    """Ids ``[N]`` of texts, joined in their order, of four million characters at most."""
    ids: list[int] = []
    left = _CHARACTERS
    for text in given:
        ids += tokenizer.encode(text.content[: max(0, left)], add_special_tokens=False, verbose=False)
        left -= len(text.content)
    return torch.tensor(ids)


def id_batches(
    ids: Tensor, length: int, batch: int, seed: int = 0, device: str | torch.device = "cpu"
) -> Callable[[int], Tensor]:
    """Batches ``[batch, length + 1]`` by number, cut at random places out of ``ids [N]``.

    Raises:
        UserError: there are fewer.
    """
    if len(ids) <= length:
        raise UserError(f"the text has {len(ids)} tokens, and a sequence takes {length + 1}: give more text")

    def get_batch(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        starts = torch.randint(len(ids) - length, (batch, 1), generator=generator)
        return ids[starts + torch.arange(length + 1)].to(device)

    return get_batch


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without gradients of its own, as it was afterwards."""
    trained, training = [p for p in model.parameters() if p.requires_grad], model.training
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for p in trained:
            p.requires_grad_(True)


def run_training(
    args: argparse.Namespace, train: Callable[[nn.Module, Callable[[int], Tensor], Line, Checkpoint], T],
    told: Callable[[T], str],
) -> int:  # fmt: skip
    """Train with the options of :func:`add_options`, save in ``args.out``, and say what it is; the status to exit with.

    Args:
        args: of the command line.
        train: by the model, batches of its text, what shows a step, and where checkpoints go.
        told: what is said of the modules.
    """
    unfinished = args.out / "training"

    def line(state: TrainState, said: str) -> None:
        if state.step % 10 == 0 or state.step == 1:
            done, left = min(1.0, state.progress), time_left(state.seconds, state.progress)
            print(f"{done:4.0%} step {state.step}: {said} {left}", flush=True)

    try:
        subject = CausalLM(args.model)
        subject.load(args.device)
        ids = encoded(texts(args.text), subject.tokenizer)
        get_batch = id_batches(ids, args.length, args.batch, args.seed, args.device)
        made = train(subject.model, get_batch, line, Checkpoint(unfinished, every=50))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    made.about["text"] = args.text
    made.save(args.out)
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{args.out}: {told(made)}")
    return 0
