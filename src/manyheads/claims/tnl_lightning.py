# SPDX-License-Identifier: Apache-2.0
"""Does decay make linear attention a better language model, and is its time per token the same at any length?

Quality: byte language models on the source of Python's standard library, equal in parameters, bytes and their order,
and each with the best of the same learning rates: TransNormerLLM with the paper's decay, with the released one, without
any, and a Llama-like softmax decoder. Loss is on files that no arm has seen.

Speed: forward and backward of one mixer on equally many tokens, in sequences of 1, 2, 4 and 8 times a length, all in
turn within one run. What is judged is time per token at 8 times the length over that at 1, which does not depend on the
machine as times do; softmax is measured alike, and the two against each other at the longest.
"""

from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    from manyheads.claims._bytes import TextSize

FLAT = 1.1  # time per token at 8 times the length over that at 1 that still counts as constant: the paper's 10 %
ARMS = {
    "softmax": "softmax",
    "tnl": "tnl_lightning",
    "tnl, alibi decay": "tnl_lightning:decay=alibi",
    "tnl, no decay": "tnl_lightning:decay=none",
}
FACTORS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained and timed."""

    text: "TextSize"
    arms: tuple[str, ...]
    heads: int  # of the mixer that is timed, 64 channels each
    length: int  # the shortest that is timed
    tokens: int  # of each timed pass
    rounds: int


def scale(setting: Setting) -> Scale:
    """The size of a run: quick in 30 s on two cores, full in ten minutes, on a GPU in three."""
    from manyheads.claims._bytes import TextSize
    from manyheads.models.decoder import DecoderConfig

    small = DecoderConfig(256, dim=64, layers=4, heads=4, length=256)
    if setting.quick:
        return Scale(TextSize(small, 220_000, 8, 30, (3e-3,), 16), ("softmax", "tnl", "tnl, no decay"), 2, 256, 2048, 3)
    rates = (1e-3, 3e-3, 1e-2)
    if setting.device == "cpu":
        return Scale(TextSize(small, 220_000, 8, 150, rates, 64), tuple(ARMS), 4, 512, 8192, 5)
    large = DecoderConfig(256, dim=256, layers=6, heads=4, length=1024)
    return Scale(TextSize(large, 5_000_000, 32, 240, rates, 128), tuple(ARMS), 16, 2048, 65_536, 10)


def times(setting: Setting, size: Scale) -> dict[tuple[str, int], list[float]]:
    """Microseconds per token of forward and backward of one mixer, by arm and factor of the length, per round.

    On a CPU by one thread: several wait for each other where the machine does other things too, for longer than they
    compute.
    """
    import torch

    from manyheads.call import MixerConfig
    from manyheads.spec import parse

    dim = 64 * size.heads
    precision = torch.autocast(setting.device, torch.bfloat16, enabled=setting.device == "cuda")
    arms = {}
    for arm in ("softmax", "tnl"):  # layer 1: LRPE-d is in the first layer only
        strategy: Any = parse(ARMS[arm])
        made = strategy.build(MixerConfig(dim, size.heads, size.heads, 64, 1, 2, size.length))
        arms[arm] = made.to(setting.device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.tokens, dim, generator=generator).to(setting.device).requires_grad_(True)
    found: dict[tuple[str, int], list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for round_ in range(size.rounds + 2):  # two to warm up
        setting.progress("timing", 0.8 + 0.2 * round_ / (size.rounds + 2))
        for arm, mixer in arms.items():
            for factor in FACTORS:
                rows = x.view(-1, size.length * factor, dim)
                _wait(setting)
                start = perf_counter()
                with precision:
                    y, _ = mixer(rows)
                y.float().square().mean().backward()
                _wait(setting)
                found.setdefault((arm, factor), []).append((perf_counter() - start) / size.tokens * 1e6)
                x.grad = None
    torch.set_num_threads(threads)
    return {key: each[2:] for key, each in found.items()}


def _wait(setting: Setting) -> None:
    if setting.device == "cuda":
        import torch

        torch.cuda.synchronize()


def run(setting: Setting) -> Outcome:
    """Train and time, and judge."""
    import numpy as np

    from manyheads.claims._bytes import estimate, losses
    from manyheads.compare import stats

    size = scale(setting)
    bits, rates = losses(setting, size.text, {arm: (ARMS[arm], "adamw") for arm in size.arms}, share=0.8)
    figures: list[Figure] = []
    for arm in size.arms:
        estimate(figures, f"loss of {arm}", bits[arm], "bits/byte")
        figures.append(Figure(f"learning rate of {arm}", rates[arm], 1))
    compared = {
        (arm, other): estimate(figures, f"loss of {arm} minus {other}", bits[arm] - bits[other], "bits/byte")
        for arm, other in (("tnl", "tnl, no decay"), ("tnl", "softmax"), ("tnl", "tnl, alibi decay"))
        if other in bits
    }
    timed = times(setting, size)
    flat = {}

    def ratio(label: str, above: tuple[str, int], below: tuple[str, int]) -> stats.Estimate:
        found = stats.spread(np.array(timed[above]) / np.array(timed[below]))
        figures.append(Figure(label, found.value, found.n, found.low, found.high))
        return found

    for arm in ("softmax", "tnl"):
        for factor in FACTORS:
            name = f"time per token of {arm} at {size.length * factor} tokens"
            figures.append(Figure(name, median(timed[arm, factor]), size.rounds, unit="us"))
        flat[arm] = ratio(f"time per token of {arm}, 8 times the length over 1", (arm, 8), (arm, 1))
    for factor in (1, 8):
        ratio(f"time of tnl over softmax at {size.length * factor} tokens", ("tnl", factor), ("softmax", factor))
    decay, softmax = compared["tnl", "tnl, no decay"], compared["tnl", "softmax"]
    better, constant = decay.high < 0, flat["tnl"].value <= FLAT
    beside = "better than" if softmax.high < 0 else "worse than" if softmax.low > 0 else "not told apart from"
    reason = (
        f"Decay {'lowers the loss' if better else 'is not shown to lower the loss'}, and time per token at "
        f"{8 * size.length} tokens is {flat['tnl'].value:.2f} times that at {size.length} (softmax "
        f"{flat['softmax'].value:.2f}; up to {FLAT} counts as constant). At this size TransNormerLLM is {beside} "
        "softmax."
    )
    return Outcome("holds" if better and constant else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="tnl_lightning",
    statement=(
        "With a fixed decay per head, gated linear attention has a lower loss than without, and its time per token in "
        "training is the same at 8 times the length."
    ),
    paper_figure=(
        "WikiText-103 at 45M parameters: test perplexity 24.03 (Transformer 24.78, HGRN 24.82, 1+elu 28.05); tokens "
        "per second and GPU flat from 1K to 128K tokens."
    ),
    run=run,
)
