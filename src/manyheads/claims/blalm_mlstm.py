# SPDX-License-Identifier: Apache-2.0
"""With few data, is mLSTM as good as softmax attention, is a window beside it better, and Muon better than AdamW?

Byte language models on the source of Python's standard library, equal in parameters, bytes and their order: softmax
with rotary positions, mLSTM, mLSTM with a sliding window mixed in by one learned number per layer, and by a gate per
token and head (dynamic). Each is trained with AdamW and with Muon, and has the best of the same learning rates for
each. Loss is on files that no arm has seen. The paper trains on 10 and 100 million words and judges by zero-shot tasks
such as BLiMP; at this size those are near chance, so loss at equal tokens is what is judged.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    from manyheads.claims._bytes import TextSize

SOFTMAX, PLAIN, STATIC, DYNAMIC = "softmax", "mlstm", "mlstm + window", "mlstm + window, dynamic"
Optimizer = Literal["adamw", "muon"]
Runs = tuple[str, Optimizer]  # an arm and what trained it
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "muon")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained."""

    text: "TextSize"
    window: int
    arms: tuple[str, ...]


def scale(setting: Setting) -> Scale:
    """The size of a run: quick in 30 s on two cores, full in ten minutes, on a GPU in three."""
    from manyheads.claims._bytes import TextSize
    from manyheads.models.decoder import DecoderConfig

    every = (SOFTMAX, PLAIN, STATIC, DYNAMIC)
    small = DecoderConfig(256, dim=64, layers=3, heads=4, length=128)
    if setting.quick:
        return Scale(TextSize(small, 180_000, 8, 30, (3e-3,), 16), 32, (PLAIN, DYNAMIC))
    rates = (1e-3, 3e-3, 1e-2)
    if setting.device == "cpu":
        return Scale(TextSize(small, 180_000, 8, 150, rates, 64), 32, every)
    large = DecoderConfig(256, dim=256, layers=4, heads=4, length=512)
    return Scale(TextSize(large, 4_000_000, 32, 150, rates, 128), 64, every)


def spec(arm: str, window: int) -> str:
    """The strategy of an arm."""
    beside = {PLAIN: "", STATIC: f":window={window},mix_by=scalar", DYNAMIC: f":window={window},mix_by=token_head"}
    return SOFTMAX if arm == SOFTMAX else "blalm_mlstm" + beside[arm]


def run(setting: Setting) -> Outcome:
    """Train every arm with both optimisers, and judge."""
    import torch

    from manyheads.claims._bytes import estimate, losses

    size = scale(setting)
    runs: dict[Runs, tuple[str, Optimizer]] = {
        (arm, optimizer): (spec(arm, size.window), optimizer) for arm in size.arms for optimizer in OPTIMIZERS
    }
    bits, rates = losses(setting, size.text, runs)
    figures: list[Figure] = []
    for (arm, optimizer), each in bits.items():
        estimate(figures, f"loss of {arm}, {optimizer}", each, "bits/byte")
        figures.append(Figure(f"learning rate of {arm}, {optimizer}", rates[arm, optimizer], 1))

    def difference(arm: str, other: str) -> bool:
        """Whether ``arm`` is better, both with Muon, which the paper trains with."""
        if arm not in size.arms or other not in size.arms:
            return False
        label = f"loss of {arm} minus {other}, muon"
        return estimate(figures, label, bits[arm, "muon"] - bits[other, "muon"], "bits/byte").high < 0

    window, gate, beats = difference(DYNAMIC, PLAIN), difference(DYNAMIC, STATIC), difference(DYNAMIC, SOFTMAX)
    difference(STATIC, PLAIN)
    difference(PLAIN, SOFTMAX)
    gains = [bits[arm, "muon"] - bits[arm, "adamw"] for arm in size.arms if arm != SOFTMAX]
    label = "loss with muon minus adamw, mean of the mlstm arms"
    muon = estimate(figures, label, torch.stack(gains).mean(0), "bits/byte").high < 0
    shown = {True: "shown", False: "not shown"}
    reason = (
        f"Lower loss with the window (dynamic) than without is {shown[window]}, with Muon than with AdamW {shown[muon]}"
        + (f"; a dynamic mix over a learned number is {shown[gate]} better" if STATIC in size.arms else "")
        + (f", and over softmax attention {shown[beats]}." if SOFTMAX in size.arms else ".")
    )
    return Outcome("holds" if window and muon else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="blalm_mlstm",
    statement=(
        "On a small corpus, a sliding window with dynamic mixing lowers the loss of an mLSTM language model of equal "
        "size, and Muon gives a lower loss than AdamW at equal steps."
    ),
    paper_figure=(
        "BabyLM STRICT and STRICT-SMALL (100M and 10M words): mLSTM with sliding-window attention improves zero-shot "
        "scores consistently, and Muon lowers perplexity against AdamW (abstract; the tables were not at hand)."
    ),
    run=run,
)
