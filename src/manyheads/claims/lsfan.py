# SPDX-License-Identifier: Apache-2.0
"""Is attention over sensors, of what is pooled over time, as good as a model of frames, and better than without it?

Classifiers of one number of parameters, of windows of 1.2 s of a phone and a watch, 12 channels; eleven people are
trained on, eight others are judged, and intervals count people. "no attention" has a wider MLP in its place, "over
time" pools sensors and attends over frames, "one token" pools both; all three have the same trunk.

Seen before the sizes were set: one temporal Transformer of 15 thousand parameters, trained 400 steps, had a macro F1 of
0.85 on the validation people. No other model was judged, none on the people of the test part. The cuda size was cut,
for its time alone, after the CPU's run, whose models were judged again when recall got the spread of a ratio. That run
had five seeds of 250 steps and left five checks open: it was given twelve of 600, and all was run again.
"""

from typing import Any

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, higher, no_worse
from manyheads.tasks.series.sensor_windows import SensorWindows

REFERENCES = tuple(Arm(name, options={"reference": name}) for name in SensorWindows.references)
ARMS = (
    *REFERENCES[1:], Arm("lsfan", "lsfan"), Arm("no attention", "lsfan:attend=false"),
    Arm("over time", "lsfan:pool=sensors"), Arm("one token", "lsfan:pool=both"), Arm("sensors alone", "lsfan:reach=1"),
)  # fmt: skip
MARGIN = 0.02  # of F1 that a rival may be ahead
SMALL: dict[str, Any] = {"layers": 2, "heads": 2}

claim = Claim(
    slug="lsfan",
    statement=(
        "A small CNN that is pooled over time and attends over sensors classifies windows of body sensors as well as "
        "recurrent and attention models of frames; attention over sensors is better than none, than attention over "
        "time, and than pooling of both."
    ),
    tier="proxy",
    reported=Reported(
        value="Competitive accuracy on EmoPain with significantly fewer parameters; its tables could not be read.",
        setting="EmoPain: windows of 3 s of motion capture and surface electromyography, people with low back pain",
        where="arXiv 2406.16913, abstract",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=REFERENCES[0], equal="parameters", tasks=(SensorWindows(),), seeds=3,
        sizes=Sizes(
            quick={**SMALL, "dim": 16, "batch": 4, "steps": 3, "rates": (3e-3,), "samples_judged": 16},
            cpu={
                "dim": 16, "batch": 24, "steps": 600, "rates": (3e-3,), "seeds": 12,
                "arms": tuple(arm for arm in ARMS if arm.name != "sensors alone"),
            },
            cuda={"dim": 48, "batch": 64, "steps": 800, "rates": (1e-3, 3e-3), "seeds": 5},
        ),
    ),
    checks=(
        *(no_worse("macro_f1", "lsfan", than=arm.name, margin=MARGIN, better="higher") for arm in REFERENCES),
        higher("macro_f1", "lsfan", than="no attention"),
        higher("macro_f1", "lsfan", than="over time"),
        higher("macro_f1", "lsfan", than="one token"),
    ),
    report=("macro_f1", "balanced_accuracy", "label_nll", "parameters"),
    caveat=(
        "Healthy people who sit, stand up, walk and turn, with 12 channels: the paper's patients are on request. At "
        "equal parameters nothing is said of how few are enough."
    ),
)  # fmt: skip
