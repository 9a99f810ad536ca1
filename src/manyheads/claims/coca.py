# SPDX-License-Identifier: Apache-2.0
"""Does a key that starts collinear with its query let a model trained on short contexts read long ones?

Byte language models of equal size are trained on contexts of T bytes of the standard library's source and judged on
files they have not seen: the loss on the last 32 bytes of a stretch, the same bytes at every context length from T to
8 T. Arms: rotary positions, ALiBi, no positions, CoCA slack and strict; the rotary ones also with dynamic NTK scaling,
which needs no training. Every arm has the same parameters, bytes, order and number of learning rates tried.

For the "headache" itself, the mean attention score at small offsets is given against the mean over all offsets.
"""

from typing import TYPE_CHECKING

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    from torch import Tensor

    from manyheads.models.decoder import Decoder

ROPE, ALIBI, NONE, SLACK, STRICT = "rope", "alibi", "none", "coca slack", "coca strict"
ARMS = {
    ROPE: "softmax", SLACK: "coca", STRICT: "coca:form=strict", ALIBI: "softmax:position=alibi",
    NONE: "softmax:position=none",
}  # fmt: skip
NTK = {ROPE: "softmax:ntk=2", SLACK: "coca:ntk=2", STRICT: "coca:form=strict,ntk=2"}
LENGTHS = (1, 2, 4, 8)  # times the trained length
OFFSETS = (0, 1, 2, 4, 8)
LAST = 32  # predictions that count
COST = 0.05  # nats that CoCA may lose within the trained length: the paper's 20.11 against 19.66 is 0.02


def offsets(model: "Decoder", ids: "Tensor") -> list[float]:
    """Mean score ``scale * q'.k'`` at OFFSETS, less the mean over all causal pairs; over layers, heads and rows."""
    import torch

    from manyheads.mixers._mixer import SoftmaxMixer, positions_of, split_heads

    found: list[Tensor] = []

    def read(mixer: SoftmaxMixer, args: tuple["Tensor", ...]) -> None:
        x = args[0]
        at = positions_of(x.shape[0], x.shape[1], x.device, None, None, None)
        q = mixer.transform_q(split_heads(mixer.q_proj(x), mixer.config.num_heads), at, at.amax(1) + 1)
        k = mixer.transform_k(split_heads(mixer.k_proj(x), mixer.config.num_kv_heads), at, at.amax(1) + 1)
        scores = (q.float() @ k.float().mT) * mixer.scale
        apart = at[0][:, None] - at[0]
        mean = scores[..., apart >= 0].mean()
        found.append(torch.stack([scores[..., apart == offset].mean() - mean for offset in OFFSETS]))

    hooks = [m.register_forward_pre_hook(read) for m in model.modules() if isinstance(m, SoftmaxMixer)]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    means: list[float] = torch.stack(found).mean(0).tolist()
    return means


def run(setting: Setting) -> Outcome:
    """Train the arms, measure their loss by length, and judge."""
    import torch

    from manyheads.claims._bytes import Task, corpus, estimate, text_draw, trained, windows, with_strategy
    from manyheads.models.decoder import DecoderConfig
    from manyheads.training import token_nll

    text, cuda = corpus(), setting.device == "cuda"
    length, batch, steps, count = (256, 64, 400, 96) if cuda else (64, 16, 150 if setting.quick else 700, 48)
    config = DecoderConfig(vocab=256, dim=256 if cuda else 64, layers=3, heads=4 if cuda else 2, length=length)
    tune = windows(text.tune, 64, length, 0).to(setting.device)
    test = windows(text.test, count, length * LENGTHS[-1], 0).to(setting.device)
    task = Task(
        config, parameters=2_600_000 if cuda else 170_000, steps=steps,
        rates=(4e-3,) if setting.quick else (2e-3, 6e-3),
        draw=lambda seed: text_draw(text.train, batch, length, seed, setting.device),
        loss=lambda model: float(token_nll(model, tune).mean()),
    )  # fmt: skip
    arms = [ROPE, SLACK] if setting.quick else list(ARMS)
    figures: list[Figure] = []
    losses: dict[tuple[str, int], Tensor] = {}  # [seeds, texts]

    def measure(name: str, models: "list[Decoder]") -> None:
        for times in LENGTHS:
            ids = test[:, -(times * length + 1) :]
            found = torch.stack([token_nll(model, ids, 8)[:, -LAST:].mean(1) for model in models])
            losses[name, times] = found
            estimate(figures, f"loss of {name} at {times}x", found.tolist(), "nats")

    for turn, arm in enumerate(arms):

        def progress(done: float, turn: int = turn, arm: str = arm) -> None:
            setting.progress(arm, (turn + 0.9 * done) / len(arms))

        models, rate = trained(task, ARMS[arm], setting, progress)
        figures.append(Figure(f"learning rate of {arm}", rate, 1))
        measure(arm, models)
        if arm in NTK:
            measure(f"{arm} + ntk", [with_strategy(model, NTK[arm]) for model in models])
            means = [offsets(model, tune[:, :-1]) for model in models]
            for i, offset in enumerate(OFFSETS):
                value = sum(each[i] for each in means) / len(means)
                figures.append(Figure(f"mean score of {arm} at offset {offset} less that of all", value, len(means)))

    def less(arm: str, other: str, times: int) -> tuple[bool, float]:
        difference = (losses[arm, times] - losses[other, times]).tolist()
        found = estimate(figures, f"loss of {arm} minus {other} at {times}x", difference, "nats")
        return found.high < 0, found.high

    bare, scaled = less(SLACK, ROPE, 8)[0], less(f"{SLACK} + ntk", f"{ROPE} + ntk", 8)[0]
    cost = less(SLACK, ROPE, 1)[1]
    others = {}
    if not setting.quick:
        less(STRICT, SLACK, 1), less(STRICT, SLACK, 8), less(f"{STRICT} + ntk", f"{SLACK} + ntk", 8)
        others = {other: less(f"{SLACK} + ntk", other, 8)[0] for other in (ALIBI, NONE)}
    longest = {name: float(losses[name, 8].mean()) for name, times in losses if times == 8}
    beaten = ", ".join(f"{other} {'beaten' if yes else 'not beaten'}" for other, yes in others.items())
    reason = (
        f"At 8x the trained length CoCA (slack) is {'better' if bare else 'not shown to be better'} than RoPE and "
        f"{'better' if scaled else 'not shown to be better'} with NTK on both; within the trained length it "
        f"{'costs no more than' if cost <= COST else 'may cost more than'} {COST} nats. Lowest loss at 8x: "
        f"{min(longest, key=lambda name: longest[name])}." + (f" Against CoCA with NTK: {beaten}." if beaten else "")
    )
    holds = bare and scaled and cost <= COST
    return Outcome("holds" if holds else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="coca",
    statement=(
        "Trained on short contexts, CoCA (slack) loses less than RoPE at eight times the length, each without and "
        f"each with dynamic NTK scaling, and at most {COST} nats within the trained length."
    ),
    paper_figure=(
        "350M model trained at 512, PG-19 perplexity at 512 / 2k / 8k / 32k: RoPE 19.66 / 3276 / 3028 / inf, with NTK "
        "19.66 / 38.0 / 138 / 381; CoCA 20.11 / 69.1 / 157 / 172, with NTK 20.11 / 25.9 / 55.8 / 101; ALiBi 18.69 / "
        "28.2 / 37.0 / out of memory."
    ),
    run=run,
)
