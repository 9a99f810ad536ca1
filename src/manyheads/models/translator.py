# SPDX-License-Identifier: Apache-2.0
"""Small translation models of transformers, to be trained from scratch: their tokenizer, batches, and what they say.

Encoder-decoders with norms before each part and sinusoidal positions, as Pegasus in transformers, and one table of
embeddings for both languages and the output. ``save_pretrained`` of model and tokenizer makes a folder that loads as
any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = [
    "Translation",
    "batches",
    "collate",
    "likelihoods",
    "new_tokenizer",
    "new_translator",
    "translate",
    "translation_loss",
]

_PAD, _END, _UNKNOWN = "<pad>", "</s>", "<unk>"
_POOL = 32  # batches that are drawn together, and shared out by length
_NOT_ASKED = -100
Pair = tuple[str, str]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Translation:
    """What a model made of a sentence.

    Attributes:
        source, target: token ids, both with the token that ends a sentence where it was said.
        text: of the target.
    """

    source: list[int]
    target: list[int]
    text: str


def new_tokenizer(texts: Sequence[str], vocab: int) -> Any:
    """Byte-level BPE of ``vocab`` tokens for both languages; a sentence ends in ``</s>``, padding is token 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token=_UNKNOWN))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[_PAD, _END, _UNKNOWN], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    made.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=_PAD, eos_token=_END, unk_token=_UNKNOWN)


def new_translator(vocab: int, dim: int = 128, layers: int = 2, heads: int = 4, length: int = 128) -> Any:
    """An untrained encoder-decoder of ``layers`` and ``layers``; its weights are drawn from torch's own generator."""
    from transformers import PegasusConfig, PegasusForConditionalGeneration

    return PegasusForConditionalGeneration(PegasusConfig(
        vocab_size=vocab, d_model=dim, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=2 * dim, decoder_ffn_dim=2 * dim, activation_function="relu",
        max_position_embeddings=length, scale_embedding=True, dropout=0.1, attention_dropout=0.0, init_std=dim**-0.5,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, forced_eos_token_id=None,
    ))  # fmt: skip


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device | str = "cpu") -> Batch:
    """Pairs of token ids as a model of transformers takes them: padded, the decoder behind its start token."""
    wide = [max(len(row[side]) for row in rows) for side in (0, 1)]
    ids, said = (torch.zeros(len(rows), size, dtype=torch.long) for size in wide)
    labels = torch.full_like(said, _NOT_ASKED)
    for i, (source, target) in enumerate(rows):
        ids[i, : len(source)] = torch.tensor(source)
        labels[i, : len(target)] = torch.tensor(target)
        said[i, 1 : len(target)] = torch.tensor(target[:-1])
    made = {"input_ids": ids, "decoder_input_ids": said, "labels": labels}
    lengths = torch.tensor([len(source) for source, _ in rows])
    made["attention_mask"] = (torch.arange(wide[0]) < lengths[:, None]).long()
    return {name: x.to(device) for name, x in made.items()}


def batches(
    tokenizer: Any, pairs: Sequence[Pair], size: int, seed: int, device: torch.device | str, longest: int = 48
) -> Callable[[int], Batch]:
    """Batches of ``size`` pairs by number, epoch by epoch; those of one batch have about one length.

    Args:
        tokenizer: of both languages.
        pairs: to train on; longer ones than ``longest`` tokens are left out.
        size: of a batch.
        seed: of the order.
        device: of the batches.
        longest: tokens of a side.
    """
    sides = [tokenizer([pair[side] for pair in pairs])["input_ids"] for side in (0, 1)]
    rows = [(s, t) for s, t in zip(*sides, strict=True) if max(len(s), len(t)) <= longest]
    count = max(1, len(rows) // size)
    orders: dict[int, list[Any]] = {}

    def order(epoch: int) -> list[Any]:
        if epoch not in orders:
            rng = np.random.default_rng([seed, epoch])
            drawn, cut = rng.permutation(len(rows)), []
            for start in range(0, len(drawn), _POOL * size):
                pool = sorted(drawn[start : start + _POOL * size], key=lambda i: (len(rows[i][1]), len(rows[i][0])))
                cut += [pool[at : at + size] for at in range(0, len(pool), size)]
            orders.clear()
            orders[epoch] = [cut[i] for i in rng.permutation(len(cut))]
        return orders[epoch]

    def get_batch(number: int) -> Batch:
        chosen = order(number // count)[number % count]
        return collate([rows[i] for i in chosen], device)

    return get_batch


def translation_loss(model: nn.Module, batch: Batch, smoothing: float = 0.1) -> Tensor:
    """Mean cross-entropy of the target's tokens with label smoothing, as translation models are trained."""
    given: Any = {name: x for name, x in batch.items() if name != "labels"}
    logits = model(**given, use_cache=False).logits.float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=_NOT_ASKED, label_smoothing=smoothing
    )


@torch.no_grad()
def translate(
    model: Any, tokenizer: Any, sentences: Sequence[str], *, longest: int = 64, size: int = 64
) -> list[Translation]:
    """What ``model`` makes of ``sentences``, greedily, in their order.

    Args:
        model: an encoder-decoder of transformers, in evaluation mode.
        tokenizer: of both languages.
        sentences: of the source language.
        longest: tokens of a translation at most.
        size: sentences at a time.
    """
    ids = tokenizer(list(sentences))["input_ids"]
    found: dict[int, Translation] = {}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    end = int(model.config.eos_token_id)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        given = collate([(ids[i], [0]) for i in part], model.device)
        made = model.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=longest,
            do_sample=False, num_beams=1,
        )[:, 1:].tolist()  # fmt: skip
        for i, row in zip(part, made, strict=True):
            said = row[: row.index(end) + 1] if end in row else row
            found[i] = Translation(ids[i], said, tokenizer.decode(said, skip_special_tokens=True).strip())
    return [found[i] for i in range(len(ids))]


@torch.no_grad()
def likelihoods(model: Any, batch: Batch) -> Tensor:
    """Mean log-probability of a token of each target of ``batch``, nats: ``[N]``."""
    given = {name: x for name, x in batch.items() if name != "labels"}
    logits, asked = model(**given, use_cache=False).logits.float(), batch["labels"] != _NOT_ASKED
    chosen = logits.log_softmax(-1).gather(2, batch["labels"].clamp(min=0)[..., None])[..., 0]
    mean: Tensor = (chosen * asked).sum(1) / asked.sum(1)
    return mean
