# SPDX-License-Identifier: Apache-2.0
"""Does a model that attends less to its instruction follow it less, turn by turn, and does moving it back help?

A small Llama learns dialogues whose instruction names the style of the reply (:mod:`manyheads.data.strategy_dialogue`),
of one to four turns, the instruction in front (standard) or next to the last message (c1_hf), half and half. It is
judged on up to twenty; where it does not follow even one turn nine times of ten, nothing is tested. Accuracy, SRA and
lift are measured in the rows that predict the reply. Controls: two tokens of noise beside the instruction, which share
its place but not its meaning, and the last layer alone.

The shipped model follows no instructions; of it is measured how SRA and lift of the first tokens of a text change with
the length, which is what has to be told apart from forgetting.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    from manyheads.data.strategy_dialogue import Form


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained and judged."""

    dim: int
    layers: int
    steps: int
    batch: int
    words: int  # of a message
    turns: tuple[int, ...]
    dialogues: int
    texts: int


def scale(setting: Setting) -> Scale:
    """The size of a run."""
    if setting.quick:
        return Scale(64, 2, 200, 64, 3, (1, 4, 12, 20), 32, 4)
    turns = (1, 2, 3, 4, 6, 8, 12, 16, 20)
    if setting.device == "cpu":
        return Scale(64, 2, 600, 64, 6, turns, 128, 16)
    return Scale(256, 4, 2000, 128, 10, turns, 512, 64)


def learned(size: Scale, seed: int, setting: Setting, done: float) -> Any:
    """A model that follows its instruction over one to four turns."""
    import torch

    from manyheads.claims._toys import llama, trained
    from manyheads.data.strategy_dialogue import VOCAB, strategy_dialogues

    def draw(step: int) -> Any:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        form: Form = "standard" if step // 4 % 2 else "c1_hf"
        ids = strategy_dialogues(size.batch, 1 + step % 4, form, generator, size.words).ids
        reply = torch.zeros_like(ids, dtype=torch.bool)
        reply[:, -2:] = True
        return ids, reply

    model = llama(VOCAB, size.dim, size.layers, 4, seed, setting.device)
    share = 1 / len(setting.seeds)
    trained(model, draw, size.steps, 3e-3, lambda part: setting.progress("training", done + part * share))
    return model


def judged(model: Any, size: Scale, form: "Form", turns: int, device: str) -> dict[str, Any]:
    """Of every dialogue ``[N]``: whether the reply is right, SRA, lift, and those of the controls."""
    import torch

    import manyheads
    from manyheads.data.strategy_dialogue import strategy_dialogues
    from manyheads.lenses.strategy_attention import sra

    generator = torch.Generator().manual_seed(2**40 + turns)
    made = strategy_dialogues(size.dialogues, turns, form, generator, size.words)
    ids = made.ids.to(device)
    length = ids.shape[1]
    roles = manyheads.TokenSpans(
        {"system": [[made.system]], "beside": [[made.beside]], "response": [[(length - 3, length - 1)]]}
    )
    with manyheads.watch(model, "strategy_attention", "strategy_attention:span=beside", roles=roles) as seen:
        best = model(ids).logits[:, -3:-1].argmax(-1)
    tables, beside = seen.compute(0).tables, seen.compute(1).tables
    return {
        "right": (best == ids[:, -2:]).all(1).double().cpu().numpy(), "SRA": sra(tables["sra"]),
        "lift": sra(tables["lift"]), "SRA beside it": sra(beside["sra"]),
        "SRA in the last layer": tables["sra"].values[:, -1].mean(-1),
    }  # fmt: skip


def of_text(figures: list[Figure], size: Scale, device: str) -> None:
    """SRA and lift of the 12 first tokens of texts under the shipped model, far and near."""
    import numpy as np
    import torch

    import manyheads
    from manyheads.claims._toys import measured
    from manyheads.data.texts import standard_library
    from manyheads.lenses.strategy_attention import per_turn
    from manyheads.models import load_default

    model, tokenizer = load_default(device)
    roles = manyheads.TokenSpans({"system": [[(1, 13)]], "response": [[(64, 512)]]})
    files = standard_library()
    with manyheads.watch(model, "strategy_attention", roles=roles) as seen, torch.no_grad():
        for text in files[:: len(files) // size.texts][: size.texts]:
            model(torch.tensor([tokenizer(text.content[:6000]).input_ids[:512]], device=device))
    for key in ("sra", "lift"):
        curve = np.stack([per_turn(row, [(64, 96), (480, 512)]) for row in seen.compute().series[key]])
        curve = curve[np.isfinite(curve).all(1)]
        name = {"sra": "SRA", "lift": "lift"}[key]
        for column, where in enumerate(("64 to 96", "480 to 512")):
            measured(figures, f"shipped model: {name} of tokens 1 to 12 at tokens {where}", curve[None, :, column])


def spearman(a: Any, b: Any) -> float:
    """Rank correlation; NaN where one does not vary."""
    from manyheads.heads import HeadTable

    one, two = (HeadTable("", ("",), x.reshape(1, -1)) for x in (a, b))
    return one.correlation(two)


def run(setting: Setting) -> Outcome:
    """Train, judge by turns and layouts, and decide."""
    import numpy as np

    from manyheads.claims._toys import measured

    size = scale(setting)
    forms: tuple[Form, ...] = ("standard", "c1_hf", "c1_hl")
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for i, seed in enumerate(setting.seeds):
        model = learned(size, seed, setting, i / len(setting.seeds))
        for form in forms:
            for turns in size.turns if form == "standard" else size.turns[-1:]:
                found.setdefault((form, turns), []).append(judged(model, size, form, turns, setting.device))

    def values(form: str, turns: int, key: str) -> Any:
        return np.stack([each[key] for each in found[form, turns]])  # [seeds, dialogues]

    figures: list[Figure] = []
    few, many = size.turns[0], size.turns[-1]
    for turns in sorted({few, 4, many}):
        measured(figures, f"accuracy, standard, {turns} turns", values("standard", turns, "right"))
        for key in ("SRA", "lift", "SRA beside it"):
            measured(figures, f"{key}, standard, {turns} turns", values("standard", turns, key))
    falls = measured(
        figures, f"accuracy, standard, {many} minus {few} turns",
        values("standard", many, "right") - values("standard", few, "right"),
    )  # fmt: skip
    gains = {}
    for form in forms[1:]:
        for key in ("right", "SRA", "lift"):
            difference = values(form, many, key) - values("standard", many, key)
            name = "accuracy" if key == "right" else key
            gains[form, key] = measured(figures, f"{name}, {many} turns, {form} minus standard", difference)
    goes = {}
    for key in ("SRA", "lift", "SRA beside it", "SRA in the last layer"):
        curves = [np.stack([values("standard", n, k).mean(1) for n in size.turns], 1) for k in ("right", key)]
        each = np.array([[spearman(a, b)] for a, b in zip(*curves, strict=True)])
        each = each[np.isfinite(each).all(1)]
        if len(each):
            goes[key] = measured(figures, f"rank correlation over turns of accuracy with {key}", each).value
    of_text(figures, size, setting.device)
    together = goes.get("SRA", 0.0) > 0.7
    helped = gains["c1_hf", "right"].low > 0 and gains["c1_hf", "SRA"].low > 0
    holds = falls.high < 0 and together and helped
    reason = (
        f"From {few} to {many} turns accuracy changes by {falls.value:+.2f}; over turns it goes with SRA "
        f"({goes.get('SRA', 0.0):.2f}), with lift {goes.get('lift', 0.0):.2f}, with SRA of noise beside the "
        f"instruction {goes.get('SRA beside it', 0.0):.2f}. Moving the instruction next to the last message changes "
        f"accuracy by {gains['c1_hf', 'right'].value:+.2f} and SRA by {gains['c1_hf', 'SRA'].value:+.3f}."
    )
    if values("standard", few, "right").mean() < 0.9:
        reason = (
            f"In {size.steps} steps the model has not learned to follow instructions at all; figures for the record."
        )
        return Outcome("not testable here", reason, tuple(figures))
    return Outcome("holds" if holds else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="strategy_attention",
    statement=(
        "As a dialogue grows, accuracy in following the instruction in front of it falls together with SRA (rank "
        "correlation over turns above 0.7), and the instruction moved next to the last message raises both."
    ),
    paper_figure=(
        "Llama-3-8B, accuracy and log SRA: standard .594 and -6.92, c1_hl .821 and -6.08, c1_hf .811 and -5.76; "
        "Pearson correlation of SRA with being right .94 (Llama-2) and .8 (Llama-3)."
    ),
    run=run,
)
