# SPDX-License-Identifier: Apache-2.0
"""Training a model that reads images to answer: the loss of the answers' tokens alone.

A batch is what the model reads, and under ``at`` and ``answers`` the places where answers are predicted, ``[N, Q]``,
and their tokens. No other token is predicted, so that only those places meet the vocabulary. A batch of
:class:`manyheads.models.image_pool.ImagePool` has ``features`` in place of pixels, the places of their tokens in all
rows behind each other, and positions and mask ``[N, 1, T, T]``: nothing in it has to be asked of the device, so that a
step can be recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .budget import Budget
from .fit import TrainState, fit
from .schedules import decay

__all__ = ["answer_logits", "answer_loss", "train_answers"]

_AT, _ANSWERS, _FEATURES = "at", "answers", "features"
_CONNECTS = "multi_modal_projector"


def answer_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the vocabulary where answers are predicted, float32 ``[N, Q, V]``."""
    if _FEATURES in batch:
        hidden = _read(model.model, batch)
    else:
        inputs = {name: x for name, x in batch.items() if name not in (_AT, _ANSWERS)}
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
    at = batch[_AT][..., None].expand(-1, -1, hidden.shape[-1])
    logits: Tensor = model.lm_head(hidden.gather(1, at))
    return logits.float()


def _read(llava: Any, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states ``[N, T, D]`` of the decoder, images given by their features."""
    features, embedded = batch[_FEATURES], llava.get_input_embeddings()(batch["input_ids"])
    with torch.autocast(features.device.type, enabled=False):  # channels far from 0 have no room for it in halves
        shown = llava.multi_modal_projector(features).flatten(0, 1).to(embedded.dtype)
    read = embedded.flatten(0, 1).index_copy(0, batch["places"], shown).view_as(embedded)
    hidden: Tensor = llava.language_model(
        inputs_embeds=read, position_ids=batch["position_ids"], attention_mask=batch["attention_mask"],
        use_cache=False,
    ).last_hidden_state  # fmt: skip
    return hidden


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the answers, nats."""
    return cross_entropy(answer_logits(model, batch).flatten(0, 1), batch[_ANSWERS].flatten())


def train_answers(
    model: nn.Module, get_batch: Callable[[int], dict[str, Tensor]], budget: Budget | str | int, *, lr: float = 2e-3,
    slower: float = 1.0, replayed: bool = False, on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:  # fmt: skip
    """Train in place what requires gradients, by AdamW: warm-up, half a cosine down to a tenth, clipping.

    Args:
        model: LlavaForConditionalGeneration, left in evaluation mode.
        get_batch: by the number of the step, as above.
        budget: as text, or a number of steps.
        lr: highest learning rate of what connects tower and decoder.
        slower: factor of the rate of everything else.
        replayed: record a step as a CUDA graph: of batches of a pool alone, on a GPU.
        on_step: see :func:`manyheads.training.fit`.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if (_CONNECTS in name) == connects], "lr": lr * factor}
        for connects, factor in ((True, 1.0), (False, slower))
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], betas=(0.9, 0.95), weight_decay=0.0, fused=replayed or None
    )
    return fit(
        model, get_batch, answer_loss, budget=budget, optimizers=[optimizer], on_step=on_step,
        replayed=replayed, schedule=decay("cosine", warmup=0.1, floor=0.1),
    )  # fmt: skip
