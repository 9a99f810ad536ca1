# SPDX-License-Identifier: Apache-2.0
"""Does a codebook of what is far, beside a memory of moving averages, make up for attention to all of it?

One layer at equal parameters and steps: full attention, exact attention within near blocks alone (Mega-chunk), memory
alone, LongVQ with 16, 64 and 256 codewords, and with 64 that say nothing of what is far, without memory, or as drawn;
beside them softmax attention. Language models of bytes read WikiText-2 with pairs to recall; encoders name genres
(bytes), spoken digits and outlines of leaves.
"""

from typing import Any

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, above, at_most, higher, lower, no_worse
from manyheads.tasks.training.codebook_use import CodebookUse
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
TEXT: Any = {"text": "wikitext", "layers": 2, "batch": 32, "judged": 48, "asked": 5, "weight": 6.0}
LENGTHS = {"fsdd.length": 4096, "osuleaf.length": 427}
SMALL = {"parameters": 180_000, "mixer_speed.parameters": 160_000, "fsdd.stride": 64, "osuleaf.stride": 7, **LENGTHS}


def text(**fields: Any) -> dict[str, Any]:
    """Fields of both tasks on text."""
    return {f"{task}.{name}": x for task in ("recall_in_text", "codebook_use") for name, x in fields.items()}


def arms(block: int, key_dim: int, longest: int) -> tuple[Arm, ...]:
    """All forms: near are blocks of ``block``, and texts of full attention have ``longest`` tokens or fewer."""
    specs = {
        FULL: f"codes=0,block={longest}", WINDOW: f"codes=0,block={block}", MEMORY: "codes=0,block=0",
        FEW: f"codes=16,block={block}", MID: f"codes=64,block={block}", MANY: f"codes=256,block={block}",
        NEAR: f"codes=64,block={block},cached=false", FORGETS: f"codes=64,block={block},ndim=0",
        RANDOM: f"codes=64,block={block},gamma=1,dead=0",
    }  # fmt: skip
    return (SOFTMAX, *(Arm(x, f"longvq:{y},key_dim={key_dim}") for x, y in specs.items()), Arm(DEFAULTS, "longvq"))


claim = Claim(
    slug="longvq",
    statement=(
        "With 64 codewords for what is far and a memory, attention predicts, recalls and classifies as well as full, "
        "better than without either and than softmax, and its time per token is the same at any length."
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
            RecallInText(**TEXT, only=TRAINED), CodebookUse(**TEXT, only=(FEW, MID, MANY, NEAR, FORGETS, RANDOM)),
            *(SequenceClassification(data=x, label=x, only=CLASSIFIED, layers=2) for x in SETS),
            MixerSpeed(only=("softmax", DEFAULTS)),
        ),
        sizes=Sizes(
            quick={"steps": 6, "rates": (4e-3,), "samples": 16, "batch": 8, **SMALL, "brown.length": 64, "rounds": 1,
                   "tokens": 1024, "mixer_speed.length": 128},
            cpu={
                **text(steps=350), "steps": 120, "rates": (4e-3,), "samples": 96, **SMALL, "brown.length": 96,
                "tokens": 4096, "mixer_speed.length": 512,
            },
            cuda={
                "arms": arms(8, 64, 512), "seeds": 3, "dim": 128, "heads": 4, "layers": 3, "parameters": 1_100_000,
                "rates": (2e-3, 4e-3), "samples": 256, "judged": 64, "steps": 200, "tune_steps": 60, "trainings": 3,
                **text(length=128, batch=64, steps=700, tune_steps=120, trainings=0), "asked": 10, "batch": 32,
                "brown.length": 512, **LENGTHS, "fsdd.stride": 8, "fsdd.stretch": 0.15, "fsdd.steps": 400, "rounds": 10,
                "mixer_speed.dim": 512, "mixer_speed.heads": 8, "mixer_speed.layers": 2, "mixer_speed.parameters": 0,
                "mixer_speed.length": 2048, "tokens": 65_536,
            },
        ),
    ),
    checks=(
        # Whether recall tells anything is up to the layer's own full form: softmax is another architecture.
        above("recalled", FULL, LEARNED, base=FULL),
        higher("recalled", MID, than=WINDOW, base=FULL),
        no_worse("recalled", MID, than=FULL, margin=RECALL, better="higher", base=FULL),
        higher("recalled", MANY, than=FEW, base=FULL),
        no_worse("token_nll", MID, than=FULL, margin=LOSS, better="lower"),
        *(lower("token_nll", MID, than=x) for x in ("softmax", WINDOW, MEMORY, NEAR, FORGETS, RANDOM)),
        *(higher(f"{data}.accuracy", MID, than=x) for data in SETS for x in (MEMORY, WINDOW)),
        *(no_worse(f"{data}.accuracy", MID, than=FULL, margin=ACCURACY, better="higher") for data in SETS),
        at_most("token_time", DEFAULTS, times=FLAT, than=DEFAULTS, where=LONG, than_where=SHORT),
        lower("token_time", DEFAULTS, than="softmax", where=LONG),
    ),
    report=("codebook_perplexity", "key_error", "recall_in_text.tuning_nll", "recall_in_text.training_nll"),
    caveat="The layer is put together from the abstract, Transformer-VQ and Mega; the paper's texts are far longer.",
)  # fmt: skip
