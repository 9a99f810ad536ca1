# SPDX-License-Identifier: Apache-2.0
"""A small GPT-2 on the Bigram-Backcopy task, on which sinks, drains and peaks grow within minutes.

The model of "Active-Dormant Attention Heads" (arXiv 2410.13835) as an ordinary GPT-2: layer norm before each part, one
head, learned positions, ReLU in the feed-forward, an output layer of its own, no biases in linear layers (they are 0
and stay so), and PyTorch's default initialisation. Claims import torch and transformers inside functions only.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from manyheads.data.bigram_backcopy import BigramBackcopy
    from manyheads.strategy import Strategy

__all__ = ["Bed", "Optimizer", "losses", "pairs_of_text", "toy", "train"]

Optimizer = Literal["adamw", "sgd"]


@dataclass(frozen=True, slots=True)
class Bed:
    """What is trained, and for how long."""

    dim: int
    layers: int
    length: int
    batch: int
    steps: int
    lr: float
    optimizer: Optimizer = "adamw"


def pairs_of_text(triggers: int = 3) -> "tuple[BigramBackcopy, str]":
    """The task, and of which text its pairs of letters are: Shakespeare where that is at hand, else Python's source."""
    from manyheads.data import files
    from manyheads.data.bigram_backcopy import BigramBackcopy
    from manyheads.data.texts import standard_library

    if files.local("tinyshakespeare"):
        return BigramBackcopy.of_text(files.text("tinyshakespeare"), triggers), "Shakespeare"
    text = "\n".join(t.content for t in standard_library()[:100])
    return BigramBackcopy.of_text(text, triggers), "the standard library's source"


def toy(task: "BigramBackcopy", bed: Bed, seed: int, device: str = "cpu") -> Any:
    """The model, untrained: a ``GPT2LMHeadModel``."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    model: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=task.vocab, n_positions=bed.length, n_embd=bed.dim, n_layer=bed.layers, n_head=1,
            activation_function="relu", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False,
            bos_token_id=task.bos, eos_token_id=None, use_cache=False,
        )
    )  # fmt: skip
    module: Any
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Embedding":
            torch.nn.init.normal_(module.weight)
        elif kind in ("Conv1D", "Linear"):
            inputs = module.weight.shape[0 if kind == "Conv1D" else 1]
            torch.nn.init.uniform_(module.weight, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))
            if module.bias is not None:
                module.bias.requires_grad_(False).zero_()
    return model.to(device).train()


def train(
    model: Any, task: "BigramBackcopy", bed: Bed, seed: int, strategy: "Strategy | None" = None,
    progress: Callable[[float], None] = lambda done: None, every: Callable[[int], None] = lambda step: None,
) -> None:  # fmt: skip
    """Train on new sequences at every step, all of which depend on ``seed`` alone.

    Args:
        model: of :func:`toy`.
        task, bed: what to train on, and how.
        seed: of the sequences.
        strategy: in use during training, such as another attention.
        progress: told the share done.
        every: told each step's number before it.
    """
    import contextlib

    import torch

    import manyheads

    device = next(model.parameters()).device
    moving = [p for p in model.parameters() if p.requires_grad]
    optimizer: Any = (
        torch.optim.AdamW(moving, lr=bed.lr, betas=(0.9, 0.99), weight_decay=1e-4)
        if bed.optimizer == "adamw"
        else torch.optim.SGD(moving, lr=bed.lr, momentum=0.9, weight_decay=1e-4)
    )
    generator = torch.Generator(device).manual_seed(1_000_003 * (seed + 1))
    with manyheads.use(model, strategy) if strategy else contextlib.nullcontext():
        for step in range(bed.steps):
            every(step)
            ids = task.draw(bed.batch, bed.length, generator)
            logits = model(ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 20 == 0:
                progress(step / bed.steps)
    model.eval()


def losses(model: Any, task: "BigramBackcopy", ids: "Tensor", *strategies: "Strategy | str") -> "tuple[Tensor, Tensor]":
    """Mean loss of each sequence ``[B]`` in nats at triggers, and elsewhere above what the task leaves open.

    Args:
        model: trained.
        task: what ``ids [B, T + 1]`` are drawn from.
        ids: sequences; each holds a trigger and other letters.
        strategies: in use meanwhile.
    """
    import contextlib

    import torch

    import manyheads

    with torch.no_grad(), manyheads.use(model, *strategies) if strategies else contextlib.nullcontext():
        logits = model(ids[:, :-1]).logits.float()
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    excess = nll + task.log_probability(ids)
    copy = task.copies(ids)
    return (nll * copy).sum(1) / copy.sum(1), (excess * ~copy).sum(1) / (~copy).sum(1)
