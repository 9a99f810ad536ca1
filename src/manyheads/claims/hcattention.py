# SPDX-License-Identifier: Apache-2.0
"""Does HCAttention hold loss and needles of the full cache with a quarter of its bytes on the device?

Nothing is dropped: keys are codes on the device, values lie in host memory, and each head fetches those of the top of
its attention. Every arm is judged by the bytes that it holds on the device; caches that drop tokens hold nothing
elsewhere, HCAttention half of the full cache on the host. The rivals' budget, of 512 tokens of SmolLM2, is what
HCAttention's codes, codebooks, window and room come to there, rounded up: codebooks are fitted on the prompt itself and
belong to its cache. The share falls with length, to an eighth.

``values=1`` fetches every value: what the top of the attention costs, and what the codes do. A quarter as many channels
in a sub-vector, four, is the paper's shape at its 12.5 %, with fewer centroids.
"""

from ..experiment import Claim, Experiment, Reported, Sizes, higher, lower, no_worse, over
from ..tasks.text.niah_single import NiahSingle
from ..tasks.text.perplexity import Perplexity

_AT = 0.27
_OURS, _CODES = "hcattention", "hcattention:centroids=64,iterations=5"
_ARMS = {
    _OURS: _CODES,
    "hcattention, every value": f"{_CODES},top_p=1.0",
    "hcattention, half the codes": f"{_CODES},groups=16",
}
_DROPPING = ("snapkv", "streaming_llm")
_RIVALS = ("hedge", *_DROPPING)
_LOSS, _NEEDLES = "perplexity.token_nll", ("niah_single.query_agnostic", "niah_single.query_aware")
# The paper's average over LongBench is full's to the first decimal at a quarter, .7 points of 43.2 below at an eighth:
# 2 %. A needle test with a twentieth fewer found would show in its maps.
_MARGIN, _FEWER = 0.02, 0.05

claim = Claim(
    slug="hcattention",
    statement=(
        "With a quarter of the full cache's bytes on the device and values in host memory, loss and needles are those "
        "of the full cache, and better than those of caches that drop tokens down to the same bytes on the device."
    ),
    tier="scaled",
    reported=Reported(
        value="LongBench 43.2 at 25 % and 42.5 at 12.5 % of the GPU cache, full 43.2; needles intact to 12.5 %",
        setting="Llama-3-8B-Instruct-Gradient-1048k, codebooks fitted beforehand, 90 % of the attention mass",
        where="LongBench table, rows of 25 % and 12.5 %, column average; needle figure",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct",
        arms=over(_ARMS) + over(_RIVALS, (_AT,)),
        tasks=(Perplexity(lengths=(512,), target=128, text="prose"), NiahSingle(lengths=(512,), text="prose")),
        sizes=Sizes(
            quick={"subject": "default", "samples": 2},
            cpu={"perplexity.samples": 8, "niah_single.samples": 12},
            cuda={"perplexity.samples": 96, "niah_single.samples": 192},
        ),
        equal="bytes",
        seeds=1,
    ),
    checks=(
        no_worse(_LOSS, _OURS, than="full", margin=_MARGIN, better="lower"),
        *(no_worse(metric, _OURS, than="full", margin=_FEWER, better="higher") for metric in _NEEDLES),
        *(lower(_LOSS, _OURS, than=rival, than_at=_AT) for rival in _DROPPING),
        no_worse(_LOSS, _OURS, than="hedge", than_at=_AT, margin=_MARGIN, better="lower"),
        *(higher(metric, _OURS, than=rival, than_at=_AT) for metric in _NEEDLES for rival in _DROPPING),
        *(no_worse(metric, _OURS, than="hedge", than_at=_AT, margin=_FEWER, better="higher") for metric in _NEEDLES),
        no_worse(_LOSS, _OURS, than="hcattention, every value", margin=_MARGIN, better="lower"),
    ),
    caveat=(
        "512 tokens of a model of 135 million parameters; codebooks fitted on the prompt, which are a quarter of the "
        "bytes here. Offloading is no compression: the host holds half of the full cache. Speed and capacity are "
        "measured by benchmarks/hcattention.py."
    ),
)  # fmt: skip
