# SPDX-License-Identifier: Apache-2.0
"""Does WAAD mark where a model plans, and FAI what it comes back to, in a language where both are known?

A small Llama learns the language of :mod:`manyheads.data.phrases`. In sequences it has not seen, WAAD of a row should
be high where the row generates the head of a phrase (AUROC, in each sequence; the other reading, that the token itself
is a head, stands beside, and so does the entropy of the prediction as a baseline), and the tokens of greatest FAI
should hold the values that are looked up later, more than as many tokens drawn blindly. A model that has not learned to
look values up within the run (loss above half of guessing) cannot test this.

Of the shipped model on source code is measured what the paper measures of language models: the entropy of predictions
at peaks of WAAD, and whether peaks of FAI come at or up to three tokens after one. Peaks are a tenth of the tokens. The
credit for RL is tested by its formula, not trained with here.
"""

from dataclasses import dataclass
from typing import Any

from manyheads.claims._old import Claim, Figure, Outcome, Setting

PEAKS, LENGTH = 0.1, 128


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is trained and judged."""

    dim: int
    layers: int
    steps: int
    batch: int
    sequences: int
    texts: int


def scale(setting: Setting) -> Scale:
    """The size of a run."""
    if setting.quick:
        return Scale(64, 2, 100, 16, 32, 4)
    if setting.device == "cpu":
        return Scale(128, 2, 1200, 16, 64, 24)
    return Scale(256, 4, 4000, 64, 512, 64)


def auroc(score: Any, label: Any) -> float:
    """Chance that a labelled entry has the greater score, ties half."""
    import numpy as np

    high, low = score[label], np.sort(score[~label])
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def entropy(logits: Any) -> Any:
    """Of each prediction, nats, as a numpy array."""
    import torch

    return torch.special.entr(logits.float().softmax(-1)).sum(-1).double().cpu().numpy()


def judged(size: Scale, seed: int, setting: Setting, done: float) -> dict[str, Any]:
    """Train one model; its scores in each sequence ``[N]``."""
    import numpy as np
    import torch

    import manyheads
    from manyheads.claims._toys import llama, trained
    from manyheads.data.phrases import PhraseLanguage
    from manyheads.lenses.reasoning_rhythm import peaks

    language = PhraseLanguage.of(0)

    def draw(step: int) -> Any:
        return language.draw(size.batch, LENGTH, torch.Generator().manual_seed(1_000_003 * seed + step)).ids, None

    model = llama(language.vocab, size.dim, size.layers, 8, seed, setting.device)
    share = 1 / len(setting.seeds)
    trained(model, draw, size.steps, 4e-3, lambda part: setting.progress("training", done + part * share))
    test = language.draw(size.sequences, LENGTH, torch.Generator().manual_seed(2**40))
    ids = test.ids.to(setting.device)
    roles = manyheads.TokenSpans({"response": [[(1, LENGTH)]]})
    with manyheads.watch(model, "reasoning_rhythm", roles=roles) as seen:
        logits = model(ids).logits
    series = seen.compute().series
    unsure = entropy(logits)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), ids[:, 1:], reduction="none").cpu()
    found: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    inside = slice(10, LENGTH - 1)  # rows with a whole window behind them and a token after
    starts, definitions = test.starts.numpy(), test.definitions.numpy()
    for n in range(size.sequences):
        fai = torch.tensor(series["fai"][n])
        fai[0] = torch.nan  # BOS is no candidate
        known = definitions[n] & fai.isfinite().numpy()
        if not known.any():  # the same sequences for every seed
            continue
        following = np.roll(starts[n], -1)
        waad = series["waad"][n]
        for name, label in (("generates", following), ("is", starts[n])):
            add(f"AUROC of WAAD, row {name} the head of a phrase", auroc(waad[inside], label[inside]))
            add(f"AUROC of entropy, row {name} the head of a phrase", auroc(unsure[n][inside], label[inside]))
        top = peaks(fai[None], PEAKS)[0].numpy()
        add("recall of definitions by FAI", float(top[known].mean()))
        add("chance of as many tokens", float(top.sum() / fai.isfinite().sum()))
        uses = test.uses[n, :-1]
        add("loss of looked-up values", float(loss[n][uses].mean()))
        add("loss within phrases", float(loss[n][~test.free[n, :-1] & ~uses].mean()))
    return {name: np.array(value) for name, value in found.items()}


def of_text(size: Scale, device: str) -> dict[str, Any]:
    """Entropy at peaks of WAAD and how peaks of FAI follow, for each text ``[1, N]``."""
    import numpy as np
    import torch

    import manyheads
    from manyheads.data.texts import standard_library
    from manyheads.lenses.reasoning_rhythm import peaks
    from manyheads.models import load_default

    model, tokenizer = load_default(device)
    files, unsure = standard_library(), []
    roles = manyheads.TokenSpans({"response": [[(32, 512)]]})
    with manyheads.watch(model, "reasoning_rhythm", roles=roles) as seen, torch.no_grad():
        for text in files[:: len(files) // size.texts][: size.texts]:
            ids = torch.tensor([tokenizer(text.content[:6000]).input_ids[:512]], device=device)
            unsure.append(entropy(model(ids).logits)[0])
    series = seen.compute().series
    found: dict[str, list[float]] = {}
    for waad, fai, entropies in zip(series["waad"], series["fai"], unsure, strict=True):
        inside = np.arange(len(waad)) >= 32
        planned, anchors = (
            peaks(torch.tensor(np.where(inside, x, np.nan))[None], PEAKS)[0].numpy() for x in (waad, fai)
        )
        near = planned | np.any([np.concatenate([np.zeros(j, bool), planned[:-j]]) for j in (1, 2, 3)], 0)
        known = inside & np.isfinite(fai)
        for name, value in (
            ("entropy at peaks of WAAD", entropies[planned].mean()),
            ("entropy at all tokens", entropies[inside].mean()),
            ("peaks of FAI at or after one of WAAD", near[anchors].mean()),
            ("all tokens at or after one of WAAD", near[known].mean()),
        ):
            found.setdefault(name, []).append(float(value))
    return {name: np.array(value)[None] for name, value in found.items()}


def run(setting: Setting) -> Outcome:
    """Train, judge, and decide."""
    import numpy as np

    from manyheads.claims._toys import measured
    from manyheads.data.phrases import PhraseLanguage

    size = scale(setting)
    each = [judged(size, seed, setting, i / len(setting.seeds)) for i, seed in enumerate(setting.seeds)]
    figures: list[Figure] = []
    toy = {name: np.stack([found[name] for found in each]) for name in each[0]}
    made = {name: measured(figures, name, value) for name, value in toy.items()}
    above = measured(
        figures, "recall by FAI above chance", toy["recall of definitions by FAI"] - toy["chance of as many tokens"]
    )
    text = of_text(size, setting.device)
    for name, value in text.items():
        measured(figures, f"shipped model: {name}", value, "nats" if "entropy" in name else "")
    more = measured(
        figures, "shipped model: entropy at peaks of WAAD above that at all tokens",
        text["entropy at peaks of WAAD"] - text["entropy at all tokens"], "nats",
    )  # fmt: skip
    follows = measured(
        figures, "shipped model: peaks of FAI that follow, above all tokens",
        text["peaks of FAI at or after one of WAAD"] - text["all tokens at or after one of WAAD"],
    )  # fmt: skip
    planned = made["AUROC of WAAD, row generates the head of a phrase"]
    holds = planned.low > 0.8 and above.low > 0 and more.low > 0
    reason = (
        f"WAAD tells rows that generate a phrase's head with AUROC {planned.value:.2f} (entropy "
        f"{made['AUROC of entropy, row generates the head of a phrase'].value:.2f}); FAI's top tenth holds "
        f"{made['recall of definitions by FAI'].value:.0%} of the definitions, by chance "
        f"{made['chance of as many tokens'].value:.0%}. In the shipped model entropy at peaks of WAAD is "
        f"{more.value:+.2f} nats from that of all tokens, and peaks of FAI follow peaks of WAAD {follows.value:+.2f} "
        f"more often."
    )
    guess = float(np.log(PhraseLanguage.of(0).values))
    if made["loss of looked-up values"].value > guess / 2:
        reason = f"In {size.steps} steps the model has not learned to look values up; figures for the record. {reason}"
        return Outcome("not testable here", reason, tuple(figures))
    return Outcome("holds" if holds else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="reasoning_rhythm",
    statement=(
        "In a language of phrases WAAD marks the rows that generate the head of a phrase (AUROC above 0.8) and FAI "
        "finds definitions that are looked up later more often than chance; in a language model predictions at "
        "peaks of WAAD have more entropy than others."
    ),
    paper_figure=(
        "Entropy 0.361 at peaks of WAAD against 0.239 at random tokens; peaks of FAI follow those of WAAD in 52.5 % "
        "against 36.9 %; with coupled credit Qwen3-8B gains 3.8 points on average over GRPO (39.4 to 43.2)."
    ),
    run=run,
)
