# SPDX-License-Identifier: Apache-2.0
"""What does latent attention cost a language model before any training, and do pairs and SVD matter as the paper says?

SmolLM2-135M gets latent attention in three ways, and nothing is trained. With a latent of full rank, a quarter of the
channels keep turning: only the choice of pairs costs. With half of them turning and three quarters of the cache, one
SVD of keys and values stands beside one of each. At a third of the cache the paper's setting (8 of 64 channels, 32
latents a head, and two more) stands beside key/value heads merged into one, whose cache is as large.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, lower
from ...experiment.subjects import Convertible
from ...tasks.text.converted_loss import ConvertedLoss

SELECTIONS = ("2-norm", "high", "low", "uniform")
BASE, SAME = Arm("the whole model"), "2-norm, one choice for all layers"
JOINT, SPLIT, LATENT, MERGED = "joint SVD", "separate SVDs", "latent, a third", "merged heads, a third"
PARTIAL, HALF = "mha2mla:keep=1,rope=0.25", "mha2mla:keep=0.75,rope=0.5"
ARMS = (
    *(Arm(each, f"{PARTIAL},select={each}") for each in SELECTIONS),
    Arm(SAME, f"{PARTIAL},same=true"),
    Arm(JOINT, HALF),
    Arm(SPLIT, f"{HALF},factors=split"),
    Arm(LATENT, "mha2mla:keep=0.3334"),
    Arm(MERGED, "kv_merging:heads=1"),
)  # fmt: skip

claim = Claim(
    slug="mha2mla",
    tier="scaled",
    statement=(
        "Of equally many rotary pairs those chosen by 2-norm cost least, one SVD of keys and values costs less than "
        "one of each, and a latent costs less than merged key/value heads of as large a cache, all before training."
    ),
    reported=Reported(
        value="Llama2-7B: KV cache 92.19 % smaller with four-bit quantisation, LongBench 0.5 % lower; of the ways to "
        "choose pairs 2-norm is best, joint SVD beats separate ones",
        setting="models of 135M to 7B parameters, fine-tuned on 0.3 to 0.6 % of their data",
        where="MHA2MLA, arXiv 2502.14837, abstract; section 4, ablation of partial RoPE and of SVD",
    ),
    experiment=Experiment(
        subject=Convertible("smollm2-135m-instruct", dtype="float32"), arms=ARMS, baseline=BASE, equal="bytes",
        tasks=(ConvertedLoss(),),
        sizes=Sizes(
            quick={"subject": Convertible("default"), "text": "code", "length": 32, "windows": 2, "sequences": 2},
            cpu={"length": 128, "windows": 12, "sequences": 8},
            cuda={"length": 512, "windows": 64, "sequences": 64},
        ),
    ),
    checks=(
        *(lower("token_nll", "2-norm", than=each) for each in SELECTIONS[1:]),
        lower("token_nll", JOINT, than=SPLIT),
        lower("token_nll", LATENT, than=MERGED),
    ),
    caveat=(
        "The paper compares after fine-tuning, this before: what breaks is seen, not what training mends. Bytes are "
        "equal within each of the three parts. Training is the claim mha2mla.recovery."
    ),
)  # fmt: skip
