# SPDX-License-Identifier: Apache-2.0
"""Does hiding what a momentum teacher attends to most make a better model of bags, and is it the teacher's choice?

Two sets, ten folds each, every bag tested once: 58 images of breast tissue (UCSB), and bags made of handwritten digits,
where it is known which instances are hard: each positive bag holds hard ones, nine of ten hold easy ones too. There the
area over positive bags without an easy instance is what the paper's argument is about. "unmasked" is trained in the
same two stages with nothing hidden, "at random" hides as many instances, drawn without the teacher; both have the steps
of MHIM-MIL, the single models half of them. "the paper's shares" are those for slides of 10^4 patches: half of the
instances at random, and one or two of the most attended.

Shares of the other arms follow from how the bags of digits are made, three easy instances of sixty. Seen before the
sizes were set, of the validation part and of ABMIL alone: the share of bags without easy instances and the number of
bags of digits were set so that it is right on most bags and not on the hard ones (areas of 1.00 and 0.90); on UCSB its
area was 0.80 to 0.89. No other arm was trained, and nothing of the test parts was read.

The first run, with a teacher that remembered 50 steps and 300 steps on digits, left all nine checks open, MHIM-MIL 0.08
above ABMIL on hard bags and level with "unmasked". Its losses in training had not come down, and on bags of digits of
another draw such a teacher failed together with its student. The momentum and the 500 steps were then set on bags of
that draw, which is of the same images, and where "unmasked" was as good as MHIM-MIL; checks and all else were left, and
all was run again on the test bags of the first run. Half of the checks are of bags that were made here: the tier, first
"scaled", is a proxy since, and a third run, of the same code and sizes, has that word.
The cuda size has not run; it was cut, for its time alone, after the CPU's.
"""

from typing import Any

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, higher, no_worse
from manyheads.tasks.vision.bag_labels import BagLabels

ABMIL, MEAN, MAX = (
    Arm(name, options={"reference": kind})
    for name, kind in (("ABMIL", "abmil"), ("mean pooling", "mean_of_bag"), ("max pooling", "max_of_bag"))
)
SHARES = "high=0.05,share=1,random=0,momentum=0.999"
OWN = "MHIM-MIL"
ARMS = (
    Arm(OWN, f"mhim:{SHARES}"), Arm("unmasked", "mhim:high=0,random=0,weight=0"),
    Arm("at random", f"mhim:{SHARES},by=random"), Arm("no consistency", f"mhim:{SHARES},weight=0"),
    Arm("the paper's shares", "mhim:momentum=0.999"), MEAN, MAX,
)  # fmt: skip
MORE = (
    Arm("transformer", options={"reference": "bag_transformer"}),
    Arm("MHIM-MIL, transformer", f"mhim:base=bag_transformer,{SHARES}"),
)
MARGIN = 0.03  # of an area that a rival may be ahead
SMALL: dict[str, Any] = {"batch": 8, "ucsb.rates": (1e-3,), "digits.rates": (3e-3,), "arms": ARMS}

claim = Claim(
    slug="mhim",
    statement=(
        "A model of bags that is trained on instances which a momentum teacher attends to less tells bags of hard "
        "instances better than attention alone, than two stages without masking, than masking at random and than "
        "without consistency; on breast tissue it is better than attention alone."
    ),
    tier="proxy",
    reported=Reported(
        value="Better than ABMIL and TransMIL, which it is put around, in AUC, accuracy and F1; tables not read again.",
        setting="CAMELYON-16 and TCGA lung cancer, patches of whole slides by a pretrained ResNet-50",
        where="arXiv 2307.15254, abstract",
    ),
    experiment=Experiment(
        subject="trainable", arms=(*ARMS, *MORE), baseline=ABMIL, equal="parameters", seeds=10,
        tasks=(BagLabels(dataset="ucsb"), BagLabels(dataset="digits")),
        sizes=Sizes(
            quick={**SMALL, "dim": 16, "batch": 4, "steps": 3, "seeds": 1},
            cpu={**SMALL, "dim": 32, "width": 64, "ucsb.steps": 200, "digits.steps": 500},
            cuda={
                **SMALL, "dim": 64, "width": 128, "batch": 16, "ucsb.steps": 150, "digits.steps": 300,
                "arms": (*ARMS, *MORE),
            },
        ),
    ),
    checks=(
        *(higher("digits.hard_auc", OWN, than=name) for name in ("ABMIL", "unmasked", "at random", "no consistency")),
        no_worse("digits.auc", OWN, than="ABMIL", margin=MARGIN, better="higher"),
        higher("ucsb.auc", OWN, than="ABMIL"),
        higher("ucsb.auc", OWN, than="unmasked"),
        higher("ucsb.auc", "the paper's shares", than="ABMIL"),
        no_worse("ucsb.auc", OWN, than="ABMIL", margin=MARGIN, better="higher"),
    ),
    report=(
        *(f"ucsb.{metric}" for metric in ("auc", "accuracy", "f1", "parameters")),
        *(f"digits.{metric}" for metric in ("hard_auc", "auc", "accuracy", "f1", "parameters")),
    ),
    caveat=(
        "Bags of 21 to 60 instances with features that are given, not slides of 10^4 patches: 58 patients, five or "
        "six a fold, and a simulation that was made so that attention has something easy to lie on."
    ),
)  # fmt: skip
