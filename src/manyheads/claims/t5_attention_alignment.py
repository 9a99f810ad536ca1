# SPDX-License-Identifier: Apache-2.0
"""Does a temperature that keeps attention as peaked as in training let a T5-bias model read longer inputs?

No T5 weights are at hand, so that the paper's own models are untested. Byte language models with T5's position bias are
trained here on contexts of T bytes of the standard library's source and read stretches of up to 8 T of other files: the
loss on the last 32 bytes, the same bytes at every context length. The temperature is calibrated, one for the model and
length, on a third set of files: by entropy, by P_max, by the closed form for normal logits, by the log-n rule, or it is
left at 1. RoPE models of the same size are the control.

Recall is a task of its own, with models of its own: four values, each of its own kind, stand anywhere among filler, and
at the end every kind is asked for once. Longer inputs have more filler.
"""

from typing import TYPE_CHECKING, Any

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Generator, Tensor

    from manyheads.mixers.t5_attention_alignment import Align
    from manyheads.models.decoder import Decoder

T5, ROPE = "t5", "rope"
PAPER: "tuple[Align, ...]" = ("entropy", "pmax")
ALIGNS: "tuple[Align, ...]" = ("none", *PAPER, "gaussian", "logn")
LAST = 32  # predictions that count
FILLER, KINDS, VALUES = 24, 4, 8  # tokens: filler, one question per kind, values of every kind


def needles(batch: int, length: int, generator: "Generator") -> "tuple[Tensor, Tensor]":
    """``ids [B, T + 1]`` with KINDS values among filler and the questions at the end; ``judged [B, T]``."""
    import torch

    ids = torch.randint(FILLER, (batch, length + 1), generator=generator)
    drawn = torch.randint(VALUES, (batch, KINDS), generator=generator)
    value = FILLER + KINDS + torch.arange(KINDS) * VALUES + drawn
    ids.scatter_(1, torch.rand(batch, length + 1 - 2 * KINDS, generator=generator).argsort(1)[:, :KINDS], value)
    order = torch.rand(batch, KINDS, generator=generator).argsort(1)
    ids[:, -2 * KINDS :: 2], ids[:, 1 - 2 * KINDS :: 2] = FILLER + order, value.gather(1, order)
    judged = torch.zeros(batch, length, dtype=torch.bool)
    judged[:, 1 - 2 * KINDS :: 2] = True
    return ids, judged


def recalled(model: "Decoder", ids: "Tensor") -> list[float]:
    """Share of the questions answered rightly in each of ``ids [N, T + 1]``."""
    import torch

    shares: list[float] = []
    with torch.no_grad():
        for rows in ids.split(8):
            said = model(rows[:, :-1])[0][:, 1 - 2 * KINDS :: 2].argmax(-1)
            shares += (said == rows[:, 1 - 2 * KINDS :: 2]).float().mean(1).tolist()
    return shares


def aligned(model: "Decoder", inputs: "Tensor", length: int, lengths: list[int]) -> dict[str, Any]:
    """The strategies, calibrated on ``inputs [B, lengths[-1]]``."""
    from manyheads.mixers.t5_attention_alignment import AttentionAlignment, calibrate

    start = AttentionAlignment(trained=length)
    return {align: calibrate(start, model, inputs, lengths, align=align, rounds=4) for align in ALIGNS}


def run(setting: Setting) -> Outcome:
    """Train, calibrate, measure loss and recall by length, and judge."""
    import torch

    from manyheads.claims._bytes import Task, corpus, estimate, text_draw, trained, windows
    from manyheads.models.decoder import DecoderConfig
    from manyheads.training import token_nll

    text, cuda, quick, device = corpus(), setting.device == "cuda", setting.quick, setting.device
    length, batch, steps, count = (256, 64, 600, 96) if cuda else (64, 16, 80, 16) if quick else (128, 8, 400, 32)
    times = (1, 2, 4) if quick else (1, 2, 4, 8)
    lengths = [length * more for more in times[1:]]
    dim, heads = (256, 4) if cuda else (64, 2)
    rates = (4e-3,) if quick else (2e-3, 6e-3)
    figures: list[Figure] = []
    got: dict[tuple[str, str, int], list[list[float]]] = {}  # (measure and model, align, times): [seeds, texts]

    def measure(name: str, models: "list[Decoder]", inputs: "Tensor", unit: str) -> None:
        """Loss or recall of all models under every alignment."""
        for model in models:
            for align, strategy in aligned(model, inputs, length, lengths).items():
                with strategy.on(model):
                    for more in times:
                        values = read[name.partition(",")[0]](model, more)
                        got.setdefault((name, align, more), []).append(values)
                if model is models[0] and align != "none":
                    taus = strategy.temperature(0, torch.tensor(lengths)[None, None]).flatten().tolist()
                    for more, tau in zip(times[1:], taus, strict=True):
                        figures.append(Figure(f"tau of {align} at {more}x, {name}, first seed", tau, 1))
        for (which, align, more), rows in got.items():
            if which == name:
                estimate(figures, f"{name}, {align}, at {more}x", rows, unit)

    test = windows(text.test, count, lengths[-1], 0).to(device)
    asked = {more: needles(count, length * more, torch.Generator().manual_seed(7))[0].to(device) for more in times}
    read: dict[str, Callable[[Decoder, int], list[float]]] = {
        "loss": lambda model, more: token_nll(model, test[:, -(more * length + 1) :], 4)[:, -LAST:].mean(1).tolist(),
        "recall": lambda model, more: recalled(model, asked[more]),
    }
    tune = windows(text.tune, 32, length, 0).to(device)
    words = Task(
        DecoderConfig(vocab=256, dim=dim, layers=3, heads=heads, length=length),
        2_600_000 if cuda else 170_000, steps, rates, lambda seed: text_draw(text.train, batch, length, seed, device),
        lambda model: float(token_nll(model, tune).mean()),
    )  # fmt: skip
    calibrating = windows(text.tune, 4, lengths[-1], 1).to(device)
    arms = [T5] if quick else [T5, ROPE]
    for turn, arm in enumerate(arms):
        models, rate = trained(
            words, f"softmax:position={arm}", setting,
            lambda done, turn=turn, arm=arm: setting.progress(f"text, {arm}", (turn + 0.7 * done) / 3),  # type: ignore[misc]
        )  # fmt: skip
        figures.append(Figure(f"learning rate, text, {arm}", rate, 1))
        measure(f"loss, {arm}", models, calibrating[:, :-1], "nats")
    if not quick:

        def draw(seed: int, step: int) -> "tuple[Tensor, Tensor]":
            generator = torch.Generator().manual_seed(1_000_003 * seed + step)
            ids, judged = needles(16, length, generator)
            return ids.to(device), judged.to(device)

        held = needles(64, length, torch.Generator().manual_seed(11))[0].to(device)
        recall = Task(
            DecoderConfig(vocab=FILLER + KINDS * (1 + VALUES), dim=64, layers=2, heads=2, length=length), 110_000,
            600 if cuda else 400, rates, lambda seed: lambda step: draw(seed, step),
            lambda model: -sum(recalled(model, held)),
        )  # fmt: skip
        models, rate = trained(
            recall, "softmax:position=t5", setting, lambda done: setting.progress("recall", (2 + 0.7 * done) / 3)
        )
        figures.append(Figure("learning rate, recall", rate, 1))
        inputs = needles(4, lengths[-1], torch.Generator().manual_seed(13))[0][:, :-1].to(device)
        measure("recall, t5", models, inputs, "")

    def against(name: str, align: str, more: int, unit: str) -> tuple[float, float]:
        pairs = zip(got[name, align, more], got[name, "none", more], strict=True)
        difference = [[a - b for a, b in zip(mine, other, strict=True)] for mine, other in pairs]
        found = estimate(figures, f"{name}, {align} minus none at {more}x", difference, unit)
        return found.low, found.high

    most = times[-1]
    helps: list[str] = []
    harms: list[str] = []
    for align in ALIGNS[1:]:
        for arm in arms:
            low, high = against(f"loss, {arm}", align, most, "nats")
            if arm == T5:
                helps += [align] if high < 0 else []
                harms += [align] if low > 0 else []
        if not quick and against("recall, t5", align, most, "")[1] < 0:
            harms.append(f"{align} (recall)")
    reason = (
        f"T5-bias models at {most}x the trained length: loss is lower than without a temperature by "
        f"{', '.join(helps) or 'none of the rules'}; loss or recall is worse by {', '.join(harms) or 'none'}."
    )
    holds = any(align in helps and f"{align} (recall)" not in harms for align in PAPER)
    return Outcome("holds" if holds else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="t5_attention_alignment",
    statement=(
        "A model with T5's position bias, trained on short contexts, predicts text better at eight times the length "
        "when its attention is aligned by entropy or by P_max, without training and without recalling less."
    ),
    paper_figure=(
        "T5 and Flan-T5 beyond 512 tokens: better language modelling, retrieval, multi-document question answering and "
        "code completion without fine-tuning, says the abstract; its figures were not at hand."
    ),
    run=run,
)
