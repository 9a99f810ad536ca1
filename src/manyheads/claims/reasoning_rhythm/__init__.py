# SPDX-License-Identifier: Apache-2.0
"""Is a model unsure where WAAD peaks in a worked answer, does FAI peak soon after, and does much hang on those tokens?

A published model works word problems of GSM8K; its own greedy answers and the given ones are read again. Peaks of WAAD
and FAI stand beside as many tokens drawn blindly and those of the greatest entropy. In its own answers the second
likeliest token is forced at the greatest FAI, and at the least FAI near it. What RL gains by credit that follows them
is judged in ``reasoning_rhythm.credit_assignment``.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, higher, lower
from ...tasks.lenses.worked_answers import WorkedAnswers

BLIND = Arm("blind draws")
OWN, GIVEN = ({"answer": kind} for kind in ("own", "given"))
PEAK, BESIDE = ({"forced": where} for where in ("greatest FAI", "beside"))

claim = Claim(
    slug="reasoning_rhythm",
    tier="scaled",
    statement=(
        "In worked answers predictions at peaks of WAAD have more entropy than others, peaks of FAI come at or soon "
        "after those of WAAD more often than other tokens do, and another token forced at the greatest FAI changes the "
        "rest of the answer more than at a token of little FAI near it."
    ),
    reported=Reported(
        value="entropy 0.361 at peaks of WAAD against 0.239 at random tokens; peaks of FAI follow those of WAAD in "
        "52.5 % against 36.9 %; words shared with the answer as it was (Jaccard) 0.534 after another token at high "
        "FAI, 0.631 at low; with coupled credit Qwen3-8B gains 3.8 points on average over GRPO (39.4 to 43.2)",
        setting="Qwen3 on its own reasoning traces",
        where="analysis of WAAD and FAI, its tables of entropy, of coupling and of perturbation; table of RL results",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", baseline=BLIND, equal="none",
        arms=tuple(Arm(name, options={"score": name.lower()}) for name in ("WAAD", "FAI", "entropy")),
        tasks=(WorkedAnswers(),),
        sizes=Sizes(
            quick={"subject": "default", "source": "sums", "problems": 4, "tokens": 48},
            cpu={"problems": 40, "tokens": 80},
            cuda={"problems": 160, "tokens": 192},
        ),
    ),
    checks=(
        *(higher("peak_entropy", "WAAD", than="blind draws", where=where) for where in (OWN, GIVEN)),
        *(higher("follows_waad", "FAI", than="blind draws", where=where) for where in (OWN, GIVEN)),
        lower("same_words", "FAI", than="FAI", where=PEAK, than_where=BESIDE),
    ),
    caveat="A model of this size solves few of the problems: its answers are worked, and mostly wrong.",
)  # fmt: skip
