# SPDX-License-Identifier: Apache-2.0
"""Does a model read its prompt through the largest channels of queries and keys, and not know what it knows by them?

In a published model the largest channels of each head of Q and K (after rotary positions) are replaced by their mean,
then as many random ones, then the smallest; the values' as a control. Contexts of one length are asked for what is
planted in them and for a fact that they do not hold, with the same answers, sets and scoring. Then keys are rounded to
4 bits with the massive channels kept exact, and with as many random ones kept: equal bits.
"""

from ..data.knowledge import GRAMMAR
from ..experiment import Arm, Claim, Experiment, Reported, Sizes, higher, lower
from ..tasks.lenses.channel_damage import CONTEXTUAL, PARAMETRIC, ChannelDamage
from ..tasks.lenses.channel_norms import ChannelNorms


def damaged(*kinds: tuple[str, str, int]) -> tuple[Arm, ...]:
    """An arm for each kind of damage, what it is of, and number of channels."""
    return tuple(
        Arm(f"{damage} {count} of {of}", f"massive_values:damage={damage},channels={count},of={of}")
        for damage, of, count in kinds
    )


def rounded(bits: int, *keep: str) -> tuple[Arm, ...]:
    """Keys rounded with two channels of each head kept exact, and with a scale for each channel instead."""
    made = [Arm(f"{bits} bits, {k} kept", f"massive_values.round_keys:bits={bits},channels=2,keep={k}") for k in keep]
    return (*made, Arm(f"{bits} bits by channel", f"massive_values.round_keys:bits={bits},per=channel"))


WAYS = ("top", "random", "bottom")
FEW = damaged(*((way, "qk", 1) for way in WAYS), ("top", "qk", 2), ("random", "qk", 2), ("top", "v", 1))
MANY = damaged(
    *((way, of, count) for of, counts in (("qk", (1, 2, 4)), ("v", (1,))) for count in counts for way in WAYS)
)
SMALL, LARGE = (*FEW, *rounded(4, "top", "random")), (*MANY, *rounded(4, *WAYS), *rounded(3, *WAYS))
READ, KNOWN = ({"knowledge": kind} for kind in (CONTEXTUAL, PARAMETRIC))
TOP = "top 1 of qk"  # as many as the paper's released code damages

claim = Claim(
    slug="massive_values",
    tier="scaled",
    statement=(
        "Replacing the largest channel of each head's queries and keys by its mean costs a model what it reads "
        "from its prompt, more than a random or the smallest one does, and more than what it knows by its weights; "
        "rounding of keys keeps what is read if it leaves the massive channels intact; the largest channels of queries "
        "and keys stand out further than those of values."
    ),
    reported=Reported(
        value="with the massive channels of Q and K replaced, passkey retrieval falls to about 0 and GSM8K, AQuA and "
        "IMDB collapse, while Cities and other knowledge questions lose some 15 to 20 %; replacing other channels "
        "changes about 1 %; AWQ and SmoothQuant, which keep massive values, keep contextual accuracy, GPTQ loses more",
        setting="Llama-2-7B, Llama-3-8B, Gemma-2-9B, Qwen2.5-7B and others; one channel of each head; 200 passkeys",
        where="table of disruption by task; figures of norms of channels; section on quantisation",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", arms=LARGE, equal="none",
        tasks=(ChannelDamage(grammar=GRAMMAR), ChannelNorms(tokens=256, text="prose")),
        sizes=Sizes(
            quick={
                "subject": "default", "arms": SMALL, "text": "code", "windows_of": 2,
                "tokens": 96, "questions": 3, "grammar": (),
            },
            cpu={"arms": SMALL, "windows_of": 4, "tokens": 84, "grammar": GRAMMAR[:1]},
            cuda={"windows_of": 24, "tokens": 160},
        ),
    ),
    checks=(
        lower("answered", TOP, than="random 1 of qk", where=READ),
        lower("answered", TOP, than="bottom 1 of qk", where=READ),
        lower("kept", TOP, than=TOP, where=READ, than_where=KNOWN),
        lower("kept", "top 2 of qk", than="top 2 of qk", where=READ, than_where=KNOWN),
        higher("answered", "4 bits, top kept", than="4 bits, random kept", where=READ),
        lower("kept", "4 bits, random kept", than="4 bits, random kept", where=READ, than_where=KNOWN),
        higher("channel_peak", "full", than="full", where={"of": "q"}, than_where={"of": "v"}),
        higher("channel_peak", "full", than="full", where={"of": "k"}, than_where={"of": "v"}),
    ),
    caveat=(
        "Heads have 64 channels, Gemma's 256, those of the paper 128. What is read are planted sentences, two in each "
        "context so that both kinds of questions are about equally hard; reasoning in the prompt (GSM8K, AQuA) is "
        "beyond the model. A fact is asked for by a key in the prompt, which has to be read as well; grammar, a "
        "figure, needs no such key. Who repeats a planted sentence, whoever is asked for, is right in half of what is "
        "read: `kept` counts an answer less the same answer to the same context asked for another name or fact, and "
        "`answered` does not. Rounding is round to nearest of keys alone, not AWQ, SmoothQuant or GPTQ."
    ),
)  # fmt: skip
