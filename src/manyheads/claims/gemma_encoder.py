# SPDX-License-Identifier: Apache-2.0
"""Is a decoder a better encoder when its mask is taken away as fine-tuning begins, with a mean and dropout?

SmolLM2-135M learns from few examples the intent of requests, and how related two sentences are. Beside the encoder with
the paper's choices stand the usual classifier on a decoder (causal, last token, a linear head), the mean under the
causal mask, the encoder without dropout or with attention or the last token as its pooler, the decoder left frozen
under a trained head, and MiniLM, which was pretrained as an encoder and is a sixth as large.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, higher, lower, no_worse
from manyheads.experiment.subjects import Convertible
from manyheads.tasks.text.encoder_tuning import EncoderTuning

# What the mean may lose to attention, of which the paper says that it is not better: two points of accuracy.
POINTS = 0.02
OURS, DECODER, CAUSAL, LAST = "gemma encoder", "decoder, last token", "causal mask", "last token"
QUERY, KV, PLAIN, FROZEN, MINILM = "query attention", "key-value attention", "no dropout", "frozen decoder", "minilm"
BASE = Arm(DECODER, "gemma_encoder:mask=causal,pooler=last,dropout=0,head=linear")
ARMS = (
    BASE, Arm(OURS, "gemma_encoder"), Arm(CAUSAL, "gemma_encoder:mask=causal"),
    Arm(QUERY, "gemma_encoder:pooler=query"), Arm(PLAIN, "gemma_encoder:dropout=0"),
    Arm(FROZEN, "gemma_encoder:mask=causal", options={"train": "head"}),
    Arm(MINILM, options={"encoder": "all-minilm-l6-v2"}),
)  # fmt: skip
MORE = (Arm(LAST, "gemma_encoder:pooler=last"), Arm(KV, "gemma_encoder:pooler=kv,count=64"))
SNIPS, SICK = EncoderTuning(label="snips"), EncoderTuning(label="sick", data="sick_relatedness")

claim = Claim(
    slug="gemma_encoder",
    tier="scaled",
    statement=(
        "Fine-tuned with a bidirectional mask, a mean over tokens and dropout, a decoder classifies and scores texts "
        "better than under its causal mask, than without dropout, and than as a usual classifier by its last token; "
        "attention as the pooler is no better than the mean."
    ),
    reported=Reported(
        value="Bidirectional attention and dropout help on most tasks; simple poolers do as well as attention; above "
        "encoders of T5's and BERT's kind on GLUE and above RankT5 on MS MARCO",
        setting="Gemma 2B and 9B, all weights fine-tuned on GLUE, SuperGLUE and MS MARCO",
        where="arXiv 2503.02656, abstract and introduction; its tables were not at hand",
    ),
    experiment=Experiment(
        subject=Convertible("smollm2-135m-instruct", dtype="float32"), arms=ARMS, baseline=BASE, equal="steps",
        tasks=(SNIPS, SICK),
        sizes=Sizes(
            quick={
                "subject": Convertible("default"), "steps": 2, "batch": 4, "examples": 8, "samples": 8, "layers": 2,
            },
            cpu={
                "seeds": 5, "layers": 6, "train": "lora", "examples": 128, "batch": 8, "steps": 30, "samples": 120,
                "length": 64, "sick.only": (DECODER, OURS, CAUSAL),
            },
            cuda={
                "arms": (*ARMS, *MORE), "seeds": 5, "layers": 12, "snips.examples": 512, "sick.examples": 1000,
                "steps": 120, "batch": 16, "samples": 350, "sick.only": (DECODER, OURS, CAUSAL),
            },
        ),
    ),
    checks=(
        lower("snips.label_nll", OURS, than=CAUSAL),
        *(higher("snips.accuracy", OURS, than=other) for other in (DECODER, CAUSAL, FROZEN)),
        lower("snips.label_nll", OURS, than=PLAIN),
        no_worse("snips.accuracy", OURS, than=QUERY, margin=POINTS, better="higher"),
        *(lower("sick.squared_error", OURS, than=other) for other in (DECODER, CAUSAL)),
    ),
    report=("snips.training_loss", "sick.training_loss"),
    caveat=(
        "On a CPU the six lowest layers of thirty are kept and adapters of rank 16 are trained for 30 steps, on a GPU "
        "all weights of the twelve lowest for 120. Ranking, which the paper also claims, is in the task "
        "(data=cranfield) and not judged here. MiniLM has seen a billion pairs of sentences and is shown, not judged. "
        "After so few steps arms still differ by how fast they learn: with dropout and a mean the training loss is "
        "twice that without dropout or with attention, and more."
    ),
)  # fmt: skip
