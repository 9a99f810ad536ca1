# SPDX-License-Identifier: Apache-2.0
"""Which mask and which pooling make the better embedding of a decoder, at as many trained parameters?

SmolLM2-135M is trained by InfoNCE on sentences of SICK that entail each other, under the five designs of the paper and
as a plain mean under the bidirectional mask. Beside them, not trained: the mean of the decoder as it is, counts of
words, and MiniLM. Judged are pairs of SemEval 2014 (captions, on a GPU headlines too) and Cranfield's abstracts for its
queries. All checks are judged together, by Holm's correction.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, higher
from manyheads.experiment.subjects import Convertible
from manyheads.tasks.text.embedding_training import EmbeddingTraining

EOS, LAST_C, LAYERS_C = "1 eos, causal", "2 last layer, causal", "3 layers, causal"
LAST_B, LAYERS_B, MEAN = "4 last layer, bidirectional", "5 layers, bidirectional", "mean, bidirectional"
WORDS, MINILM, AS_IS = "words", "minilm", "mean, untrained"


def design(mask: str, pooling: str, mult: int) -> str:
    """Of a strategy."""
    return f"pooling:mask={mask},pooling={pooling},heads=9,mult={mult}"


def arms(mult: int) -> tuple[Arm, ...]:
    """All that are compared, trained pooling with a feed-forward part of so many widths."""
    return (
        Arm(EOS, "pooling:mask=causal,pooling=eos"), Arm(LAST_C, design("causal", "last_layer", mult)),
        Arm(LAYERS_C, design("causal", "layers", mult)), Arm(LAST_B, design("bidirectional", "last_layer", mult)),
        Arm(LAYERS_B, design("bidirectional", "layers", mult)), Arm(MEAN, "pooling:pooling=mean"),
        Arm(AS_IS, "pooling:mask=causal,pooling=mean", options={"steps": 0}), Arm(WORDS, options={"encoder": "words"}),
        Arm(MINILM, options={"encoder": "all-minilm-l6-v2"}),
    )  # fmt: skip


SMALL = tuple(
    Arm(arm.name, arm.spec.replace("heads=9", "heads=6"), options=arm.options) for arm in arms(1)
)  # of the shipped model

claim = Claim(
    slug="pooling",
    tier="scaled",
    statement=(
        "A bidirectional mask with trained pooling over all layers embeds texts for similarity and retrieval better "
        "than the end-of-text token of a causal decoder, pooling over all layers better than over the last one, under "
        "either mask, and all of it better than a plain mean."
    ),
    reported=Reported(
        value="Bidirectional attention with trained pooling is better in similarity and retrieval (p < .05) and not in "
        "classification and clustering; pooling over all layers is better than over the last in similarity and "
        "retrieval: no design is the best everywhere",
        setting="Mistral-7B and Qwen2-0.5B with LoRA of rank 16 on 1.4 million pairs, MTEB, Wilcoxon's test for each "
        "pair of designs without correction",
        where="arXiv 2409.02727, abstract and results on MTEB; a plain mean is not among its designs",
    ),
    experiment=Experiment(
        subject=Convertible("smollm2-135m-instruct", dtype="float32"), arms=arms(4), baseline=arms(4)[0],
        equal="parameters", tasks=(EmbeddingTraining(),),
        sizes=Sizes(
            quick={
                "subject": Convertible("default"), "arms": SMALL, "layers": 2, "steps": 2, "batch": 3, "samples": 6,
                "queries": 2, "documents": 20, "length": 16, "rank": 4, "sets": ("sts-2014-images",),
            },
            cpu={
                "arms": arms(1), "seeds": 5, "layers": 6, "steps": 12, "batch": 6, "samples": 60, "queries": 10,
                "documents": 60, "length": 32, "sets": ("sts-2014-images",),
            },
            cuda={
                "seeds": 5, "layers": 12, "steps": 100, "batch": 32, "samples": 300, "queries": 100, "documents": 700,
            },
        ),
    ),
    checks=(
        *(higher("similarity", LAYERS_B, than=other) for other in (EOS, LAST_B, MEAN)),
        higher("similarity", LAYERS_C, than=LAST_C),
        *(higher("ndcg", LAYERS_B, than=other) for other in (EOS, LAST_B)),
    ),
    report=("trained_parameters", "training_loss"),
    together=True,
    caveat=(
        "On a CPU the six lowest layers of thirty are kept, training has 12 steps of 6 pairs, and trained pooling has "
        "one width of neurons: what is seen is the beginning. Adapters of arms with smaller poolers have a higher "
        "rank, so that all train as many parameters. MiniLM has seen a billion pairs; it and what is not trained are "
        "shown, not judged. On a CPU the means of counts of words are above those of all that is trained."
    ),
)  # fmt: skip
