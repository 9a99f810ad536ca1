# SPDX-License-Identifier: Apache-2.0
"""Does a model read its prompt through the largest channels of queries and keys, and not know what it knows by them?

In a published model the largest channels of each head of Q and K (after rotary positions) are replaced by their mean,
then as many random ones, then the smallest; the values' largest ones as a control. A planted constant is asked for, as
in the paper's passkeys, and ordinary code is read. Toys that learn to recall pairs, and facts, in prompts of one form,
stand beside it: there what tells both kinds apart is where the knowledge comes from.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, higher, lower
from ..tasks.lenses.channel_damage import CONTEXTUAL, PARAMETRIC, ChannelDamage
from ..tasks.lenses.channel_norms import ChannelNorms
from ..tasks.lenses.recall_and_facts import RecallAndFacts


def arms(counts: tuple[int, ...] = (1, 2, 4, 8)) -> tuple[Arm, ...]:
    """Damage of each kind to as many channels of Q and K, and to one of V."""
    damaged = [("qk", count) for count in counts] + [("v", 1)]
    return tuple(
        Arm(f"{damage} {count} of {of}", f"massive_values:damage={damage},channels={count},of={of}")
        for of, count in damaged
        for damage in ("top", "random", "bottom")
    )


TOP = "top 1 of qk"  # as many as the paper's released code damages

claim = Claim(
    slug="massive_values",
    tier="scaled",
    statement=(
        "Replacing the largest channel of each head's queries and keys by its mean costs a model what it reads "
        "from its prompt, more than a random or the smallest one does, and more than what it knows by its weights; "
        "the largest channels of queries and keys stand out further than those of values."
    ),
    reported=Reported(
        value="with the massive channels of Q and K replaced, passkey retrieval falls to about 0 and GSM8K, AQuA and "
        "IMDB collapse, while Cities and other knowledge questions lose some 15 to 20 %; replacing other channels "
        "changes about 1 %",
        setting="Llama-2-7B, Llama-3-8B, Gemma-2-9B, Qwen2.5-7B and others; one channel of each head; 200 passkeys",
        where="table of disruption by task; figures of norms of channels",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", arms=arms(), equal="none",
        tasks=(ChannelDamage(), ChannelNorms(), RecallAndFacts(steps=2500)),
        sizes=Sizes(
            quick={"subject": "default", "arms": arms((1,))[:3], "windows_of": 8, "tokens": 120, "steps": 200},
            cpu={"arms": arms((1, 4)), "windows_of": 16, "tokens": 160},
            cuda={"windows_of": 48, "tokens": 512},
        ),
    ),
    checks=(
        lower("constant_found", TOP, than="random 1 of qk"),
        lower("constant_found", TOP, than="bottom 1 of qk"),
        lower("kept", TOP, than=TOP, where={"knowledge": CONTEXTUAL}, than_where={"knowledge": PARAMETRIC}),
        higher("channel_peak", "full", than="full", where={"of": "q"}, than_where={"of": "v"}),
        higher("channel_peak", "full", than="full", where={"of": "k"}, than_where={"of": "v"}),
    ),
    caveat=(
        "What is parametric is the next token of code where it cannot be copied. Judged is the published model; the "
        "toys are small models of ours, figures and no word. Heads have 64 channels, those of the paper 128."
    ),
)  # fmt: skip
