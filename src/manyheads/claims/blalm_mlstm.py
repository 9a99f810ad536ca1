# SPDX-License-Identifier: Apache-2.0
"""With few data, is mLSTM as good as softmax attention, is a window beside it better, and Muon better than AdamW?

Byte language models of one size on the source of Python's standard library: softmax with rotary positions, mLSTM, mLSTM
with a sliding window mixed in by one learned number per layer, and by a gate per token and head (dynamic). Each is
trained with AdamW and with Muon, each at the best of the same learning rates. Loss is on files that no arm has seen.
The paper trains on 10 and 100 million words and judges by zero-shot tasks such as BLiMP; at this size those are near
chance, so loss at equal tokens is what is judged.
"""

from collections.abc import Mapping
from typing import Any

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, lower
from manyheads.tasks.training.byte_lm import ByteLM

MUON: Mapping[str, Any] = {"optimizer": "muon"}
SPECS = {
    "softmax": "softmax",
    "mlstm": "blalm_mlstm",
    "mlstm + window": "blalm_mlstm:window={window},mix_by=scalar",
    "mlstm + dynamic window": "blalm_mlstm:window={window},mix_by=token_head",
}
SOFTMAX = Arm("softmax", "softmax", options=MUON)


def arms(window: int) -> tuple[Arm, ...]:
    """Every mixer under either optimiser."""
    made = [(name, spec.format(window=window)) for name, spec in SPECS.items()]
    return tuple(arm for name, spec in made for arm in (Arm(name, spec, options=MUON), Arm(f"{name}, adamw", spec)))


claim = Claim(
    slug="blalm_mlstm",
    statement=(
        "On a small corpus, a sliding window with dynamic mixing lowers the loss of an mLSTM language model of equal "
        "size, and Muon gives a lower loss than AdamW at equal steps."
    ),
    tier="proxy",
    reported=Reported(
        value="A sliding window improves zero-shot scores consistently; Muon lowers perplexity against AdamW.",
        setting="BabyLM STRICT and STRICT-SMALL, 100M and 10M words",
        where="arXiv 2511.05560, abstract; its tables were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=arms(32), baseline=SOFTMAX, equal="parameters",
        tasks=(ByteLM(length=128, batch=8, heads=4),),
        sizes=Sizes(
            quick={"steps": 14, "rates": (3e-3,), "samples": 24, "parameters": 180_000},
            cpu={"steps": 110, "rates": (3e-3, 1e-2), "parameters": 180_000},
            cuda={
                "arms": arms(64), "dim": 256, "layers": 4, "length": 512, "batch": 32, "steps": 150, "samples": 128,
                "rates": (1e-3, 3e-3, 1e-2), "parameters": 4_000_000,
            },
        ),
    ),
    checks=(
        lower("token_nll", "mlstm + dynamic window", than="mlstm"),
        lower("token_nll", "mlstm + dynamic window", than="mlstm + window"),
        lower("token_nll", "mlstm + dynamic window", than="softmax"),
        lower("token_nll", "mlstm + dynamic window", than="mlstm + dynamic window, adamw"),
        lower("token_nll", "mlstm", than="mlstm, adamw"),
    ),
    report=("tuning_nll", "training_nll"),
    caveat="How the paper mixes the window in is our reading of its abstract, see the strategy.",
)  # fmt: skip
