# SPDX-License-Identifier: Apache-2.0
"""Is it enough to choose by layout, once for all layers, what a word on a page looks at?

Page encoders of one size, trained from scratch on generated forms, name the label of every word; that of a value is
told by its key alone, beside or above it. Beside text alone, in the order that a form is read: LayoutLM's sum of
embeddings, which is the strongest rival. Ablations: a map for each layer, one axis of the page alone, words' numbers in
place of boxes, no layout at all. Then the maps, as masks for all-MiniLM-L6-v2 as it is published, which knows nothing
of layout: a linear probe reads labels off its states. Its controls are as many of the nearest words, and random ones.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, at_most, higher, lower, no_worse
from manyheads.tasks.training.form_labels import FormLabels
from manyheads.tasks.training.form_reader import FormReader
from manyheads.tasks.training.page_cost import PageCost

# What one map may lose to a map for each layer: two points of value_accuracy; the paper claims to lose nothing.
POINTS = 0.02
TEXT, LAYOUT, SKIM, EACH = "text", "layoutlm sum", "skim", "a map each layer"
ACROSS, DOWN, ORDER, NONE, CONTEXT, ADDED = "x only", "y only", "order only", "no layout", "with context", "embeddings"
OWN = "skim_attention:resolution=64"
MAIN = (
    Arm(TEXT, "softmax"), Arm(LAYOUT, "skim_attention.embeddings:resolution=64"), Arm(SKIM, OWN),
    Arm(EACH, f"{OWN},shared=false"), Arm(ACROSS, f"{OWN},axes=x"), Arm(DOWN, f"{OWN},axes=y"),
    Arm(NONE, f"{OWN},axes=none"),
)  # fmt: skip
PARTS = (
    Arm(ORDER, f"{OWN},axes=order"), Arm(ADDED, "skim_attention.embeddings:resolution=64,position=none"),
)  # fmt: skip
LARGE = Arm(CONTEXT, f"{OWN},context=2")  # more than all parameters of the small models


def reading(by: str) -> Arm:
    """MiniLM under a mask."""
    return Arm(f"minilm, {by}", "softmax", options={"mask": by, "map_of": SKIM})


READERS = tuple(reading(by) for by in ("full", "skim", "nearest", "random"))
FULL, MASKED, NEAREST, RANDOM = (arm.name for arm in READERS)
NAMES = tuple(arm.name for arm in (*MAIN, *PARTS, LARGE))
COSTS, LONG = (TEXT, LAYOUT, SKIM, EACH), {"times": 8}

claim = Claim(
    slug="skim_attention",
    statement=(
        "With attention from layout alone, one map for all layers, an encoder labels the words of forms better than "
        "from text and than with LayoutLM's sum of embeddings, and is cheaper; as a mask the map improves a published "
        "encoder while restricting its attention."
    ),
    tier="proxy",
    reported=Reported(
        value="A lower perplexity than prior works at less computation; masks improve pre-trained models while "
        "restricting attention.",
        setting="Pre-training on documents at 512 tokens, 12 layers of 768; layout analysis of DocBank",
        where="arXiv 2109.01078, abstract; its tables were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=(*MAIN, *PARTS, *READERS), baseline=MAIN[0], equal="parameters",
        tasks=(FormLabels(only=NAMES), FormReader(), PageCost(only=COSTS)),
        sizes=Sizes(
            quick={
                "arms": (*MAIN, *READERS), "steps": 6, "batch": 4, "rates": (3e-3,), "samples": 8, "fitted": 16,
                "form_labels.dim": 32, "form_reader.dim": 32, "form_labels.layers": 2, "form_reader.layers": 2,
                "tokens": 512, "page_cost.length": 64, "rounds": 2,
            },
            cpu={
                "steps": 600, "batch": 12, "form_labels.length": 40, "form_reader.length": 40, "rates": (3e-3,),
                "form_labels.samples": 128, "form_reader.samples": 64, "fitted": 96,
                "form_labels.heads": 4, "form_reader.heads": 4, "form_labels.layers": 2, "form_reader.layers": 2,
                "page_cost.length": 64, "page_cost.layers": 4, "page_cost.heads": 4, "tokens": 1024, "rounds": 4,
            },
            cuda={
                "arms": (*MAIN, *PARTS, LARGE, *READERS), "form_labels.dim": 128, "form_reader.dim": 128,
                "form_labels.heads": 4, "form_reader.heads": 4, "form_labels.layers": 4, "form_reader.layers": 4,
                "form_labels.length": 64, "form_reader.length": 64, "batch": 24, "steps": 1000, "rates": (1.5e-3, 3e-3),
                "tune_steps": 400, "form_labels.samples": 256, "form_reader.samples": 256, "fitted": 384,
                "top_k": 16, "page_cost.dim": 384, "page_cost.heads": 12, "page_cost.layers": 12,
                "page_cost.length": 256, "tokens": 16_384, "rounds": 8,
            },
        ),
    ),
    checks=(
        *(higher("value_accuracy", SKIM, than=other) for other in (TEXT, LAYOUT, ACROSS, DOWN, NONE)),
        no_worse("value_accuracy", SKIM, than=EACH, margin=POINTS, better="higher"),
        *(lower("token_time", SKIM, than=other, where=LONG) for other in (LAYOUT, EACH)),
        at_most("kept", SKIM, times=1.0, than=LAYOUT, where=LONG),
        *(higher("value_probed", MASKED, than=other) for other in (FULL, NEAREST, RANDOM)),
    ),
    report=("accuracy", "probed", "products", "training_nll"),
    caveat=(
        "Forms are generated, with four fields; the paper pre-trains on real documents by masked words and fine-tunes "
        "what it masks. Maps are trained on labels of other forms, the masked encoder is frozen and a probe is fitted. "
        "Costs are beside flash attention, which keeps no map, where a shared map is kept once. At CPU size encoders "
        "are still learning, and seeds differ by more than arms."
    ),
)  # fmt: skip
