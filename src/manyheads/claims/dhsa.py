# SPDX-License-Identifier: Apache-2.0
"""Does DHSA read the right tokens of a long prompt, better than other choices of as many, and what is that worth?

All sparse arms share first, local and last tokens and read exactly as many others for every block of queries
(``attention_recall.pairs`` shows it). With chunks of one length DHSA is a top-k of block means: ``block mean`` is both.
Recall is of the dense model's own attention; loss and needles are of the model that read its prompt sparsely in all
layers, and then decodes densely. Time is against the same model's dense prompt by flash attention, on a GPU.

Boundaries of ``dhsa`` were fitted to this model on essays, and ship; those of ``fitted here`` are fitted in the run to
other windows of the corpus, once for each seed. In a quick run on the default model, to which nothing is fitted,
``dhsa`` has chunks of one length.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, at_most, higher, lower, no_worse
from ..tasks.text.attention_recall import AttentionRecall
from ..tasks.text.niah_single import NiahSingle
from ..tasks.text.perplexity import Perplexity
from ..tasks.text.speed import Speed

_SMALL = "budget=96,block=32,first=16,local=32,last=32"  # 176 of 640 tokens
_LARGE = "budget=512,block=128,first=128,local=128,last=64"  # 896 of 4,096 and of 8,000
_OWN = ",boundaries=smollm2-135m-instruct"


def _arms(sizes: str, own: str = _OWN) -> tuple[Arm, ...]:
    """All that is compared, at one size of everything that is read."""
    ours = {
        "dhsa": own, "dhsa, fitted here": "", "dhsa, mean of a chunk": f"{own},norm=mean",
        "dhsa, sum of a chunk": f"{own},norm=sum", "dhsa, per kv head": f"{own},index=kv",
        "dhsa, per query head": f"{own},index=query",
    }  # fmt: skip
    rivals = {
        "block mean": "block_mean", "block mean, per query head": "block_mean,index=query", "a-shape": "a_shape",
        "vertical-slash": "vertical_slash", "minference": "minference,index=query", "random": "random",
        "oracle": "oracle",
    }  # fmt: skip
    specs = {name: f"dhsa:{sizes}{more}" for name, more in ours.items()}
    specs |= {name: f"dhsa.rival:{sizes},by={by}" for name, by in rivals.items()}
    return tuple(Arm(name, spec, options={"fit": True} if "fitted" in name else {}) for name, spec in specs.items())


_RECALL, _LOSS, _NEEDLE = "attention_recall.recall", "perplexity.token_nll", "niah_single.query_aware"
_RIVALS = ("block mean", "a-shape", "vertical-slash", "minference", "random")
_FEW = ("full", "dhsa", "block mean", "random")
_MANY = (*_FEW, "vertical-slash", "minference")
_MARGIN = 0.005  # half a percent of the attention

claim = Claim(
    slug="dhsa",
    statement=(
        "At equal pairs of query and key, the chunks that learned boundaries make, scored by their mean key times the "
        "root of their length, hold more of the model's attention than block means, an A-shape, lines or chance; a "
        "model that reads its prompt so loses next to nothing, finds the needles that it finds densely, and reads it "
        "in at most four fifths of the time."
    ),
    tier="scaled",
    reported=Reported(
        value="matches dense attention on needles and LongBench, 6 to 18 % above block-sparse attention (relative); "
        "prefill latency 20 to 60 % lower, peak memory 35 % lower",
        setting="Gemma-2-2B, budgets of 1,024 and 2,048 tokens, prompts of 8k to 32k, dense attention by eager code",
        where="abstract, the needle and LongBench tables, and the latency table of the released code's README",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct",
        arms=_arms(_LARGE),
        tasks=(
            AttentionRecall(lengths=(4096, 8000), text="prose"),
            Perplexity(lengths=(4096, 8000), text="prose", only=_MANY),
            NiahSingle(lengths=(4096, 8000), text="prose", only=_MANY),
            Speed(lengths=(8000,), timed=("full", "dhsa", "block mean"), gpu_only=True),
        ),
        sizes=Sizes(
            quick={
                "subject": "default", "arms": _arms("budget=48,block=16,first=16,local=16,last=16", ""), "samples": 2,
                "lengths": (320,), "rounds": 1, "only": _FEW, "fit_texts": 3, "fit_tokens": 128, "fit_steps": 20,
            },
            cpu={
                "arms": _arms(_SMALL), "lengths": (640,), "samples": 4, "seeds": 1, "only": _FEW, "fit_texts": 5,
                "fit_tokens": 384, "fit_steps": 100,
            },
            cuda={"samples": 24, "attention_recall.samples": 8, "rounds": 6},
        ),
        equal="none",
        seeds=3,
    ),
    checks=(
        *(higher(_RECALL, "dhsa", than=rival, margin=_MARGIN) for rival in _RIVALS),
        *(higher(_RECALL, "dhsa", than=f"dhsa, {norm} of a chunk", margin=_MARGIN) for norm in ("mean", "sum")),
        higher(_RECALL, "dhsa, per kv head", than="dhsa", margin=_MARGIN),
        no_worse(_LOSS, "dhsa", than="full", margin=0.05, better="lower"),  # 5 % of perplexity
        *(lower(_LOSS, "dhsa", than=rival) for rival in _FEW[2:]),
        no_worse(_NEEDLE, "dhsa", than="full", margin=0.1, better="higher"),
        *(higher(_NEEDLE, "dhsa", than=rival) for rival in _FEW[2:]),
        at_most("speed.prefill", "dhsa", times=0.8, than="full"),
    ),
    caveat=(
        "A model of 135 million parameters, prose, and needles in it; 4,096 and 8,000 tokens, where the rest of the "
        "model takes most of the time (640 on a CPU). The paper times eager dense attention; here it is flash."
    ),
)  # fmt: skip
