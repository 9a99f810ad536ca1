# SPDX-License-Identifier: Apache-2.0
"""Does a codebook of what is far, beside a memory of moving averages, make up for attention to all of it?

One layer in all its forms, at equal parameters and steps: full attention, exact attention within near blocks alone
(Mega-chunk), memory alone, LongVQ with 16, 64 and 256 codewords, and with 64 that say nothing of what is far, without
memory, or as they were drawn; beside them softmax attention. Language models of bytes read WikiText-2 mixed with pairs
that are asked for later; encoders name genres (bytes), spoken digits and outlines of leaves.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, above, at_most, higher, lower, no_worse
from manyheads.tasks.training.mixer_speed import MixerSpeed
from manyheads.tasks.training.recall_in_text import RecallInText
from manyheads.tasks.training.sequence_classification import SequenceClassification

SOFTMAX = Arm("softmax", "softmax")
FULL, WINDOW, MEMORY, FEW, MID, MANY = "full", "window", "memory alone", "16 codes", "64 codes", "256 codes"
NEAR, FORGETS, RANDOM = "64 codes, nothing far", "64 codes, no memory", "64 random codes"
# What 64 codewords may lose to full attention in the same layer (the paper gains by them): nats/byte, shares of values
# and of sequences; what full attention has to recall before others' recall says something; growth that is still linear.
LOSS, RECALL, ACCURACY, LEARNED, FLAT = 0.02, 0.1, 0.05, 0.6, 1.2
CLASSIFIED = ("softmax", FULL, WINDOW, MEMORY, FEW, MID, MANY)
TRAINED, DEFAULTS = (*CLASSIFIED, NEAR, FORGETS, RANDOM), "128 codes, blocks of 128"
SETS, LONG, SHORT = ("brown", "fsdd", "osuleaf"), {"times": 8}, {"times": 1}
SMALL = {
    "parameters": 180_000, "mixer_speed.parameters": 160_000, "fsdd.length": 4096, "fsdd.stride": 64,
    "osuleaf.length": 427, "osuleaf.stride": 7,
}  # fmt: skip


def arms(block: int, key_dim: int, longest: int) -> tuple[Arm, ...]:
    """All forms: near are blocks of ``block``, and texts of full attention have ``longest`` tokens or fewer."""
    specs = {
        FULL: f"codes=0,block={longest}", WINDOW: f"codes=0,block={block}", MEMORY: "codes=0,block=0",
        FEW: f"codes=16,block={block}", MID: f"codes=64,block={block}", MANY: f"codes=256,block={block}",
        NEAR: f"codes=64,block={block},cached=false", FORGETS: f"codes=64,block={block},ndim=0",
        RANDOM: f"codes=64,block={block},gamma=1,dead=0",
    }  # fmt: skip
    made = (Arm(name, f"longvq:{spec},key_dim={key_dim}") for name, spec in specs.items())
    return (SOFTMAX, *made, Arm(DEFAULTS, "longvq"))


claim = Claim(
    slug="longvq",
    statement=(
        "With a memory of moving averages and 64 codewords for what is far, gated attention predicts, recalls and "
        "classifies no worse than with full attention, better than without either part and than softmax attention, and "
        "takes the same time per token at any length."
    ),
    tier="scaled",
    reported=Reported(
        value="Significant improvements over variants of Transformers, convolutions and recent state-space models.",
        setting="Long Range Arena, autoregressive language modelling, image and speech classification",
        where="arXiv 2404.11163, abstract; its tables were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=arms(8, 32, 128), baseline=SOFTMAX, equal="parameters",
        tasks=(
            RecallInText(text="wikitext", only=TRAINED, layers=2, batch=32, judged=48, asked=5, weight=6.0),
            *(SequenceClassification(data=x, called=x, only=CLASSIFIED, layers=2) for x in SETS),
            MixerSpeed(only=("softmax", DEFAULTS)),
        ),
        sizes=Sizes(
            quick={
                "steps": 6, "rates": (4e-3,), "samples": 16, "batch": 8, **SMALL, "brown.length": 64, "rounds": 1,
                "tokens": 1024, "mixer_speed.length": 128,
            },
            cpu={
                "recall_in_text.steps": 350, "steps": 120, "rates": (4e-3,), "samples": 96, **SMALL,
                "brown.length": 96, "tokens": 4096, "mixer_speed.length": 512,
            },
            cuda={
                "arms": arms(16, 64, 512), "seeds": 4, "dim": 128, "heads": 4, "layers": 3, "parameters": 1_100_000,
                "rates": (1.5e-3, 4e-3), "samples": 256, "recall_in_text.length": 256, "recall_in_text.batch": 64,
                "pairs": 8, "keys": 32, "asked": 4, "judged": 128, "recall_in_text.steps": 750,
                "recall_in_text.tune_steps": 200, "batch": 32, "steps": 250, "tune_steps": 80, "brown.length": 512,
                "fsdd.length": 4096, "fsdd.stride": 8, "osuleaf.length": 427, "mixer_speed.dim": 512,
                "mixer_speed.heads": 8, "mixer_speed.layers": 2, "mixer_speed.parameters": 0,
                "mixer_speed.length": 2048, "tokens": 65_536, "rounds": 10,
            },
        ),
    ),
    checks=(
        above("recalled", FULL, LEARNED),
        higher("recalled", MID, than=WINDOW),
        no_worse("recalled", MID, than=FULL, margin=RECALL, better="higher"),
        higher("recalled", MANY, than=FEW),
        no_worse("token_nll", MID, than=FULL, margin=LOSS, better="lower"),
        *(lower("token_nll", MID, than=x) for x in ("softmax", WINDOW, MEMORY, NEAR, FORGETS, RANDOM)),
        *(higher(f"{data}.accuracy", MID, than=x) for data in SETS for x in (MEMORY, WINDOW)),
        *(no_worse(f"{data}.accuracy", MID, than=FULL, margin=ACCURACY, better="higher") for data in SETS),
        at_most("token_time", DEFAULTS, times=FLAT, than=DEFAULTS, where=LONG, than_where=SHORT),
        lower("token_time", DEFAULTS, than="softmax", where=LONG),
    ),
    report=("recall_in_text.tuning_nll", "recall_in_text.training_nll"),
    caveat="The layer is put together from the abstract, Transformer-VQ and Mega; the paper's texts are far longer.",
)  # fmt: skip
