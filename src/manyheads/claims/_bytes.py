# SPDX-License-Identifier: Apache-2.0
"""What claims on byte language models share: text, the same draws for every arm, equal tuning, intervals over seeds.

An arm is a strategy in a decoder of the same number of parameters. Every arm tries the same learning rates on the first
seed, keeps the one with the least loss on text set aside, and is trained with it on the other seeds. All arms of a seed
see the same bytes in the same order.
"""

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyheads.claims._old import Figure, Setting
    from manyheads.compare.stats import Estimate
    from manyheads.models.decoder import Decoder, DecoderConfig
    from manyheads.strategy import Strategy
    from manyheads.training import BatchFn, OptimizerName
    from manyheads.training.language import Batch

__all__ = ["Corpus", "Task", "TextSize", "corpus", "estimate", "losses", "text_draw", "trained", "windows"]

Arm = TypeVar("Arm", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on, to tune and calibrate with, and to judge by, uint8 each; no file is in two of them."""

    train: "Tensor"
    tune: "Tensor"
    test: "Tensor"


def corpus() -> Corpus:
    """The standard library's source: eight of ten files to train on, one to tune with, one to judge by."""
    import torch

    from manyheads.data.texts import standard_library

    files = [text.content.encode() for text in standard_library()]
    random.Random(0).shuffle(files)
    parts = [[f for i, f in enumerate(files) if i % 10 in digits] for digits in (range(8), [8], [9])]
    return Corpus(*(torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts))


def windows(data: "Tensor", count: int, length: int, seed: int) -> "Tensor":
    """``count`` stretches of ``data``, one in each equal part of it: int64 ``[count, length + 1]``."""
    import torch

    room = len(data) // count
    if room < length + 1:
        raise ValueError(f"{len(data)} bytes do not hold {count} windows of {length + 1}")
    start = torch.randint(room - length, (count,), generator=torch.Generator().manual_seed(seed))
    return data[(torch.arange(count) * room + start)[:, None] + torch.arange(length + 1)].long()


def text_draw(data: "Tensor", batch: int, length: int, seed: int, device: str) -> "BatchFn[Batch]":
    """Random stretches of ``data``: what a step gets depends on seed and step alone."""
    import torch

    def draw(step: int) -> "tuple[Tensor, Tensor | None]":
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        start = torch.randint(len(data) - length, (batch, 1), generator=generator)
        return data[start + torch.arange(length + 1)].long().to(device), None

    return draw


@dataclass(frozen=True)
class Task:
    """What all arms are trained on.

    Attributes:
        config: of the decoder; its feed-forward width is fitted to ``parameters``.
        parameters: of every arm.
        steps: of training.
        rates: learning rates to try.
        draw: given the seed, the draws of a run.
        loss: of a trained model on what is set aside for tuning.
        optimizer: as for :func:`manyheads.training.train_lm`.
    """

    config: "DecoderConfig"
    parameters: int
    steps: int
    rates: Sequence[float]
    draw: "Callable[[int], BatchFn[Batch]]"
    loss: "Callable[[Decoder], float]"
    optimizer: "OptimizerName" = "adamw"


def trained(
    task: Task, strategy: "Strategy | str", setting: "Setting", progress: Callable[[float], None]
) -> "tuple[list[Decoder], float]":
    """One decoder per seed, and the learning rate that was chosen on the first."""
    import torch

    from manyheads.models.decoder import Decoder
    from manyheads.training import TrainState, choose_rate, train_lm

    runs = len(task.rates) + len(setting.seeds) - 1
    done = 0

    def one(seed: int, rate: float) -> "Decoder":
        nonlocal done
        torch.manual_seed(seed)
        model = Decoder.matched(strategy, task.config, task.parameters).to(setting.device)

        def on_step(state: TrainState) -> None:
            if state.step % 20 == 0:
                progress((done + state.progress) / runs)

        train_lm(model, task.draw(seed), task.steps, lr=rate, optimizer=task.optimizer, on_step=on_step)
        done += 1
        return model

    first, rate = choose_rate(task.rates, lambda rate: one(setting.seeds[0], rate), task.loss)
    return [first, *(one(seed, rate) for seed in setting.seeds[1:])], rate


@dataclass(frozen=True, slots=True)
class TextSize:
    """How much is trained on text, and judged by.

    Attributes:
        config: of the decoders.
        parameters: of every arm.
        batch: sequences of a step, each of ``config.length`` bytes.
        steps: of every training.
        rates: learning rates to try.
        windows: stretches of text to tune with, and as many to judge by.
    """

    config: "DecoderConfig"
    parameters: int
    batch: int
    steps: int
    rates: tuple[float, ...]
    windows: int


def losses(
    setting: "Setting", size: TextSize, arms: "Mapping[Arm, tuple[str, OptimizerName]]", share: float = 1.0
) -> "tuple[dict[Arm, Tensor], dict[Arm, float]]":
    """Train every arm, a strategy and what trains it, on text, and judge it on files that no arm has seen.

    Args:
        setting: of the claim; hears of progress.
        size: of what is trained.
        arms: what is trained by what.
        share: of the claim's work that this is.

    Returns:
        Bits per byte of each arm, ``[seeds, windows]``, and the learning rate that it chose.
    """
    import torch

    from manyheads.training import token_nll

    text, length = corpus(), size.config.length
    tune, test = (windows(part, size.windows, length, 0).to(setting.device) for part in (text.tune, text.test))
    bits, rates = {}, {}
    for i, (arm, (strategy, optimizer)) in enumerate(arms.items()):
        task = Task(
            size.config, size.parameters, size.steps, size.rates,
            draw=lambda seed: text_draw(text.train, size.batch, length, seed, setting.device),
            loss=lambda model: float(token_nll(model, tune).mean()), optimizer=optimizer,
        )  # fmt: skip

        def progress(done: float, i: int = i, message: str = f"training {strategy} by {optimizer}") -> None:
            setting.progress(message, share * (i + done) / len(arms))

        models, rates[arm] = trained(task, strategy, setting, progress)
        bits[arm] = torch.stack([token_nll(model, test).mean(1) / math.log(2) for model in models])
    return bits, rates


def with_strategy(model: "Decoder", strategy: "Strategy | str") -> "Decoder":
    """The same weights under another strategy that has the same ones."""
    from manyheads.models.decoder import Decoder

    hidden: Any = model.blocks[0]
    made = Decoder(strategy, replace(model.config, hidden=hidden.ffn.gate.out_features))
    made.load_state_dict(model.state_dict())
    return made.to(next(model.parameters()).device).eval()


def estimate(
    figures: "list[Figure]", label: str, values: "Sequence[Sequence[float]] | torch.Tensor", unit: str = ""
) -> "Estimate":
    """Mean of ``values [seeds, texts]``, its interval over seeds or, with one seed, over texts; adds a figure."""
    import numpy as np

    from manyheads.claims._old import Figure
    from manyheads.compare import stats

    table = np.array([[float(x) for x in row] for row in values], dtype=float)
    each = table.mean(1) if len(table) > 1 else table[0]
    found = stats.mean(each, np.arange(len(each), dtype=float), 0, label)
    figures.append(Figure(label, found.value, found.n, found.low, found.high, unit))
    return found
