# SPDX-License-Identifier: Apache-2.0
"""Does D2O lose less than H2O and StreamingLLM at the same number of slots, and do its mergers and layer budgets help?

Prose is read whole, each arm compresses the same prefill, and the text goes on, 16 tokens at a time; after each piece
every arm evicts down to its slots again. D2O, H2O and the random control keep four first tokens and a quarter of their
slots for recent ones. What D2O gains over itself without mergers is what mergers are worth, and over itself with equal
layers what its layer budgets are; a hundredth of a nat, 1 % of perplexity, is the least that counts either way. Mergers
weighed by the attention that tokens received, which is ours, show whether it is the weights that harm; they are
reported. Pair recall, on the fixture, is the case without redundancy: no token stands for another, so that a merger has
nothing to gain; it is reported and not judged.
"""

from ..experiment import Claim, Experiment, Reported, Sizes, lower, over
from ..tasks.text.pair_recall import PairRecall
from ..tasks.text.perplexity import Perplexity

_KEEP, _LEAST = (0.5, 0.2), 0.01
_LOSS = "perplexity.token_nll"
_ARMS = {
    "d2o": "d2o",
    "d2o without merging": "d2o:merging=False",
    "d2o, equal layers": "d2o:layer_alloc=uniform",
    "h2o": "h2o:sinks=4,recent_share=0.25",
    "streaming_llm": "streaming_llm:schedule=step",
    "random": "random:schedule=step,sinks=4,recent=19",  # a quarter of the least budget of a full run on a CPU
}
_WEIGHTS = {"d2o, released weights": "d2o:weights=code", "d2o, weights by attention": "d2o:weights=attention"}

claim = Claim(
    slug="d2o",
    statement=(
        "Keeping 20 to 50 % of the cache, D2O loses less than H2O and StreamingLLM with the same number of slots, "
        "because it gives layers budgets of their own and merges what it drops into what it keeps."
    ),
    tier="scaled",
    reported=Reported(
        value="above H2O and StreamingLLM at equal budgets of 20 % and below; more than 3x the throughput of full",
        setting="Llama-2/3, Mistral and Falcon on GSM8K, CoQA, TruthfulQA, LongBench and needle tests",
        where="abstract and the main tables by task; no single cell is the headline",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct",
        arms=over(_ARMS, _KEEP) + over(_WEIGHTS, _KEEP[1:]),
        tasks=(Perplexity(lengths=(384,), target=64, piece=16, text="prose"), PairRecall(sequences=192)),
        sizes=Sizes(
            quick={"subject": "default", "samples": 4, "lengths": (256,), "target": 32, "sequences": 8},
            cpu={"samples": 16, "sequences": 64},
            cuda={"samples": 96, "lengths": (2048,), "target": 128, "sequences": 384},
        ),
        equal="slots",
        seeds=1,
    ),
    checks=(
        *(lower(_LOSS, "d2o", than=rival, at=keep) for keep in _KEEP for rival in ("h2o", "streaming_llm", "random")),
        *(
            lower(_LOSS, "d2o", than=part, at=keep, margin=_LEAST)
            for keep in _KEEP
            for part in ("d2o without merging", "d2o, equal layers")
        ),
    ),
    caveat=(
        "Loss of prose that goes on, not the paper's tasks. Slots are equal and bytes are not: D2O holds up to a tenth "
        "more than H2O (SmolLM2 8.6 % in the run on a CPU), as rows of a batch with layer budgets of their own are "
        "stored as wide as the widest; that is to its advantage. Throughput is benchmarks/d2o_throughput.py's. Pair "
        "recall is of our fixture of 361 thousand parameters."
    ),
)
