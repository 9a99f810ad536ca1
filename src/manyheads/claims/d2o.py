# SPDX-License-Identifier: Apache-2.0
"""Does D2O lose less than H2O and StreamingLLM at the same number of slots, and do its mergers and layer budgets help?

A text is read whole, each arm compresses the same prefill, and the text goes on, 16 tokens at a time; after each piece
every arm evicts down to its slots again. D2O, H2O and the random control keep four first tokens and a quarter of their
slots for recent ones. What D2O gains over itself without mergers is what mergers are worth, and over itself with equal
layers what its layer budgets are. Pair recall, on the fixture, is the case without redundancy: no token stands for
another, so that a merger has nothing to gain; it is reported and not judged.
"""

from ..experiment import Claim, Experiment, Reported, Sizes, lower, over
from ..tasks.text.pair_recall import PairRecall
from ..tasks.text.perplexity import Perplexity

_KEEP = (0.5, 0.2, 0.1)
_LOSS = "perplexity.token_nll"
_ARMS = {
    "d2o": "d2o",
    "d2o, released weights": "d2o:weights=code",
    "d2o without merging": "d2o:merging=False",
    "d2o, equal layers": "d2o:layer_alloc=uniform",
    "h2o": "h2o:sinks=4,recent_share=0.25",
    "streaming_llm": "streaming_llm:schedule=step",
    "random": "random:schedule=step,sinks=4,recent=12",  # a quarter of the least budget
}

claim = Claim(
    slug="d2o",
    statement=(
        "Keeping 10 to 50 % of the cache, D2O loses less than H2O and StreamingLLM with the same number of slots, "
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
        arms=over(_ARMS, _KEEP),
        tasks=(Perplexity(lengths=(512,), target=128, piece=16), PairRecall(sequences=192)),
        sizes=Sizes(
            quick={"subject": "default", "samples": 4, "lengths": (256,), "target": 32, "sequences": 8},
            cpu={"samples": 12, "lengths": (256,), "target": 64, "sequences": 96},
            cuda={"samples": 64, "lengths": (2048,), "target": 128, "sequences": 384},
        ),
        equal="slots",
        seeds=1,
    ),
    checks=(
        *(lower(_LOSS, "d2o", than=rival, at=keep) for keep in _KEEP for rival in ("h2o", "streaming_llm", "random")),
        # Where the paper says that the parts matter: its ablations stand at 20 %.
        *(lower(_LOSS, "d2o", than=part, at=0.2) for part in ("d2o without merging", "d2o, equal layers")),
    ),
    caveat=(
        "Loss of code that goes on, not the paper's tasks. D2O's bytes are a few per cent above the others': rows of a "
        "batch with layer budgets of their own are stored as wide as the widest. Throughput is not measured. Pair "
        "recall is of our fixture of 361 thousand parameters."
    ),
)
