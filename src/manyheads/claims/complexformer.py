# SPDX-License-Identifier: Apache-2.0
"""Does a learned gain and offset on the phase, per head and plane, make a better language model than RoPE?

Byte language models of equal size, trained on the standard library's source and judged on other files, at the trained
length and at twice that. Arms: RoPE, ComplexFormer started at RoPE (delta = 1) and as the released code starts it
(delta normal), and RoPE whose frequencies are learned per head, which is the cheaper way to give heads positions of
their own. Differences are paired by seed: the same bytes in the same order.

Speed and memory of the separable form are given against the literal one, a phase for every pair, 8 queries at a time
as in the released code. The paper was withdrawn and gives no figure that we could find.
"""

from time import perf_counter
from typing import TYPE_CHECKING, Any

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from manyheads.call import MixerConfig
    from manyheads.strategy import Strategy

ROPE, ONE, NORMAL, LEARNED = "rope", "cmha, start one", "cmha, start normal", "rope, learned frequencies"
LAST = 32  # predictions that count
CHUNK = 8  # queries at a time in the released code


def learned_frequencies() -> "Strategy":
    """RoPE with a factor on every frequency, learned per head."""
    import torch

    from manyheads.mixers._mixer import SoftmaxMixer
    from manyheads.strategy import Mixer

    class Attention(SoftmaxMixer):
        def __init__(self, config: "MixerConfig") -> None:
            super().__init__(config)
            self.factor = torch.nn.Parameter(torch.zeros(config.num_heads * config.head_dim // 2))  # its logarithm

        def _rotate(self, q: "Tensor", positions: "Tensor") -> "Tensor":
            planes = q.shape[-1] // 2
            base = 10_000.0 ** (-torch.arange(planes, device=q.device) / planes)
            turn = positions[:, None, :, None] * (base * self.factor.exp().view(-1, planes))[:, None]
            first, second = q.chunk(2, -1)
            cos, sin = turn.cos(), turn.sin()
            return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).to(q.dtype)

        def transform_q(self, q: "Tensor", positions: "Tensor", length: "Tensor") -> "Tensor":
            return self._rotate(q, positions)

        def transform_k(self, k: "Tensor", positions: "Tensor", length: "Tensor") -> "Tensor":
            return self._rotate(k, positions)

    class LearnedFrequencies(Mixer):
        def build(self, config: "MixerConfig") -> "nn.Module":
            return Attention(config)

    return LearnedFrequencies()


def literal(mixer: Any, q: "Tensor", k: "Tensor") -> "Tensor":
    """Scores ``[B, H, T, T]`` by a phase for every pair."""
    import torch

    planes, length = q.shape[-1] // 2, q.shape[2]
    delta, b = (x.view(1, -1, 1, 1, planes) for x in (mixer.delta, mixer.b))
    parts = [x.split(planes, -1) for x in (q, k)]
    size_q, size_k = ((re.square() + im.square() + 1e-9).sqrt() for re, im in parts)
    phase_q, phase_k = (torch.atan2(im, re) for re, im in parts)
    at = torch.arange(length, device=q.device)
    frequency = 10_000.0 ** (-torch.arange(planes, device=q.device) / planes)
    rows = []
    for start in range(0, length, CHUNK):
        cut = slice(start, start + CHUNK)
        apart = (at[cut, None] - at)[..., None] * frequency
        phase = delta * (phase_q[:, :, cut, None] - phase_k[:, :, None]) + b + apart
        rows.append((size_q[:, :, cut, None] * size_k[:, :, None] * phase.cos()).sum(-1))
    scores: Tensor = torch.cat(rows, 2) * mixer.scale
    return scores


def forms(setting: Setting, length: int) -> "tuple[float, float, float, float]":
    """Seconds of scores in the literal and in the separable form, the best of three, and bytes beyond the result.

    Bytes are those allocated at the peak on a GPU; on a CPU those of the phases of 8 queries, and of q' and k'.
    """
    import torch

    from manyheads.call import MixerConfig
    from manyheads.spec import parse

    torch.manual_seed(0)
    strategy: Any = parse("complexformer:start=normal")
    mixer = strategy.build(MixerConfig(256, 4, 4, 64, 0, 1, length)).to(setting.device)
    q, k = torch.randn(2, 1, 4, length, 64, device=setting.device)
    at = torch.arange(length, device=setting.device)[None]

    def separable() -> "Tensor":
        kept = mixer.transform_k(k, at, at.amax(1)).mT
        scores: Tensor = (mixer.transform_q(q, at, at.amax(1)) @ kept) * mixer.scale
        return scores

    times: list[float] = []
    held: list[float] = []
    results: list[Tensor] = []
    both: list[Callable[[], Tensor]] = [lambda: literal(mixer, q, k), separable]
    for form in both:
        best = float("inf")
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        with torch.no_grad():
            for _ in range(3):
                start = perf_counter()
                result = form()
                if setting.device == "cuda":
                    torch.cuda.synchronize()
                best = min(best, perf_counter() - start)
        if setting.device == "cuda":
            held.append(float(torch.cuda.max_memory_allocated() - before - result.nbytes))
        times.append(best)
        results.append(result)
    if not torch.allclose(results[0], results[1], atol=1e-3):
        raise ArithmeticError("the separable form differs from the literal one")
    if not held:
        held = [float(4 * 4 * CHUNK * length * 32), float(q.nbytes + k.nbytes)]
    return times[0], times[1], held[0], held[1]


def run(setting: Setting) -> Outcome:
    """Train the arms, measure their losses and the cost of both forms, and judge."""
    import torch

    from manyheads.claims._bytes import Task, corpus, estimate, text_draw, trained, windows
    from manyheads.models.decoder import DecoderConfig
    from manyheads.training import token_nll

    text, cuda = corpus(), setting.device == "cuda"
    length, batch, steps, count = (256, 64, 500, 192) if cuda else (64, 16, 120 if setting.quick else 800, 192)
    config = DecoderConfig(vocab=256, dim=256 if cuda else 64, layers=3, heads=4 if cuda else 2, length=length)
    tune = windows(text.tune, 64, length, 0).to(setting.device)
    test = windows(text.test, count, 2 * length, 0).to(setting.device)
    task = Task(
        config, parameters=2_600_000 if cuda else 170_000, steps=steps,
        rates=(4e-3,) if setting.quick else (2e-3, 6e-3),
        draw=lambda seed: text_draw(text.train, batch, length, seed, setting.device),
        loss=lambda model: float(token_nll(model, tune).mean()),
    )  # fmt: skip
    arms: dict[str, Strategy | str] = {ROPE: "softmax", ONE: "complexformer", NORMAL: "complexformer:start=normal"}
    if not setting.quick:
        arms[LEARNED] = learned_frequencies()
    figures: list[Figure] = []
    losses: dict[tuple[str, int], Tensor] = {}
    for turn, (arm, strategy) in enumerate(arms.items()):

        def progress(done: float, turn: int = turn, arm: str = arm) -> None:
            setting.progress(arm, (turn + 0.95 * done) / len(arms))

        models, rate = trained(task, strategy, setting, progress)
        figures.append(Figure(f"learning rate of {arm}", rate, 1))
        for times in (1, 2):
            ids = test[:, -(times * length + 1) :]
            losses[arm, times] = torch.stack([token_nll(model, ids)[:, -LAST:].mean(1) for model in models])
            estimate(figures, f"loss of {arm} at {times}x", losses[arm, times].tolist(), "nats")
    better: dict[tuple[str, int], bool] = {}
    worse: dict[tuple[str, int], bool] = {}
    for arm in arms:
        for times in (1, 2):
            if arm != ROPE:
                difference = (losses[arm, times] - losses[ROPE, times]).tolist()
                found = estimate(figures, f"loss of {arm} minus {ROPE} at {times}x", difference, "nats")
                better[arm, times], worse[arm, times] = found.high < 0, found.low > 0
    for size in (128,) if setting.quick else (512, 1024):
        slow, quick, much, little = forms(setting, size)
        figures += [
            Figure(f"time of scores at {size} tokens, literal", slow, 3, unit="s"),
            Figure(f"time of scores at {size} tokens, separable", quick, 3, unit="s"),
            Figure(f"bytes at {size} tokens, literal", much, 1, unit="bytes"),
            Figure(f"bytes at {size} tokens, separable", little, 1, unit="bytes"),
        ]

    def say(arm: str, times: int) -> str:
        return "better" if better[arm, times] else "worse" if worse[arm, times] else "not shown to differ"

    parts = [f"{arm}: {say(arm, 1)} at the trained length, {say(arm, 2)} at twice that" for arm in arms if arm != ROPE]
    reason = f"Against RoPE, paired by {'text' if setting.quick else 'seed'}: {'; '.join(parts)}."
    holds = any(better[arm, 1] and not worse[arm, 2] for arm in (ONE, NORMAL))
    return Outcome("holds" if holds else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="complexformer",
    statement=(
        "With the same parameters and training, ComplexFormer from one of its two starts has a lower loss than RoPE at "
        "the trained length and no higher one at twice that."
    ),
    paper_figure=(
        "Lower generation perplexity and better long-context coherence than RoPE, says the abstract; no figure was "
        "found, and the paper has been withdrawn."
    ),
    run=run,
)
