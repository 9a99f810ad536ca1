# SPDX-License-Identifier: Apache-2.0
"""Train a small masked diffusion language model on worked sums and prose: minutes on a GPU.

    python -m manyheads.recipes.masked_diffusion_lm --out FOLDER [--model smollm2-135m-instruct] [--budget 3m]

The loss is LLaDA's: of each row a share of the reply (of prose, of all) is hidden. A reply is filled up with the token
that ends it, so that the model learns where to end in a room of any size. With ``--model`` it goes on from a decoder,
which then sees both sides and, as Dream's does, still predicts the next token, so that little has to be learned anew;
without, a decoder of that class is trained from scratch. The folder is a plain checkpoint, whose config has
``is_causal: false``: ``manyheads generate --model FOLDER "What is 4 + 17 - 3?"``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from manyheads.data.texts import Text
from manyheads.errors import UserError
from manyheads.experiment import CausalLM
from manyheads.generate.texts import read
from manyheads.integrations.decoding import end_tokens
from manyheads.integrations.masked_diffusion import TokenDenoiser
from manyheads.models.chat import chats
from manyheads.progress import time_left
from manyheads.recipes._adapters import encoded, texts
from manyheads.recipes.reasoning_rhythm import Problem, drawn_sums
from manyheads.training import Budget, Checkpoint, TrainState, decay, fit, optimizers_of
from manyheads.training.masked_diffusion import Corrupted, corrupt, masked_diffusion_loss
from manyheads.training.optimizers import OptimizerName

__all__ = ["from_decoder", "lessons", "small", "solved_row", "train_denoiser"]

_MASK, _END = "<|mask|>", "<|endoftext|>"
_SEEN = 400_000  # characters that a tokenizer is made from


def small(
    prose: Sequence[Text], *, dim: int = 128, layers: int = 4, heads: int = 4, vocab: int = 1024,
    digits: bool = True, seed: int = 0,
) -> tuple[Any, Any]:  # fmt: skip
    """An untrained model, a Llama that sees both sides, and its tokenizer.

    Args:
        prose: texts from which the tokenizer is made.
        dim, layers, heads: of the model.
        vocab: tokens, the mask and the end among them.
        digits: write them one by one; else numbers as they come, for small ones.
        seed: of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    apart = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*apart, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    sums = drawn_sums(1500, np.random.default_rng(0), largest=99 if digits else 9)
    seen = "".join(text.content[:4000] for text in prose)[:_SEEN]
    bpe.train_from_iterator(
        [seen, *(f"{problem.question} {problem.answer}" for problem in sums)],
        trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=[_END, _MASK], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=_END, mask_token=_MASK)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=dim, intermediate_size=8 * dim // 3, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.update({"is_causal": False, "mask_token_id": tokenizer.mask_token_id, "use_cache": False})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def from_decoder(model: Any, tokenizer: Any) -> None:
    """Make a decoder see both sides, in place, and give it a mask token, whose embedding is the mean of all."""
    tokenizer.add_special_tokens({"mask_token": _MASK})
    tables = model.get_input_embeddings().weight
    mean = tables.detach().float().mean(0)
    if (known := len(tokenizer)) > len(tables):
        model.resize_token_embeddings(known, pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.mask_token_id] = mean.to(tables)
    model.config.update(
        {"is_causal": False, "mask_token_id": tokenizer.mask_token_id, "predicts_next": True, "use_cache": False}
    )


def solved_row(tokenizer: Any, problem: Problem) -> tuple[list[int], list[int]]:
    """Tokens of a problem as ``generate`` writes it, and of its worked answer."""
    between = "" if chats(tokenizer) else " "
    answer: list[int] = tokenizer.encode(between + problem.answer, add_special_tokens=False)
    return read(tokenizer, problem.question, None), answer


def lessons(
    model: Any, tokenizer: Any, prose: Tensor | None = None, *, lengths: Sequence[int] = (96, 160, 288),
    tokens: int = 8192, share: float = 0.25, terms: int = 3, largest: int = 99,
    without: Collection[str] = (), seed: int = 0,
) -> Callable[[int], Corrupted]:  # fmt: skip
    """Batches by number, see :mod:`manyheads.training.masked_diffusion`, on the model's device.

    Args:
        model, tokenizer: what is trained.
        prose: ids ``[N]``; None for sums alone.
        lengths: of rows, one after the other, so that a reply has rooms of several sizes.
        tokens: of a batch.
        share: of the rows that are prose.
        terms, largest: of the sums.
        without: questions that are left out.
        seed: of all draws.

    Raises:
        UserError: the model has no mask token or no end.
    """
    mask, ends = TokenDenoiser(model).mask, sorted(end_tokens(model, tokenizer))
    if not ends:
        raise UserError("the model has no token that ends a text")
    device, row_of = next(model.parameters()).device, cache(lambda problem: solved_row(tokenizer, problem))

    def get_batch(number: int) -> Corrupted:
        rng, length = np.random.default_rng([seed, number]), lengths[number % len(lengths)]
        count = max(1, tokens // length)
        read_prose = 0 if prose is None or len(prose) <= length else round(share * count)
        ids = torch.full((count, length), ends[0])
        asked = torch.ones(count, length, dtype=torch.bool)
        drawn: list[Problem] = []
        while len(drawn) < count - read_prose:
            more = drawn_sums(count, rng, terms, largest)
            drawn += [problem for problem in more if problem.question not in without]
        for i, problem in enumerate(drawn[: count - read_prose]):
            prompt, answer = row_of(problem)
            row = torch.tensor([*prompt, *answer][:length])
            ids[i, : len(row)] = row
            asked[i, : len(prompt)] = False
        for i in range(count - read_prose, count):
            start = int(rng.integers(len(prose) - length)) if prose is not None else 0
            ids[i] = prose[start : start + length] if prose is not None else ids[i]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        found = corrupt(ids, asked, mask, generator)
        return found[0].to(device), found[1].to(device), found[2].to(device)

    return get_batch


def train_denoiser(
    model: nn.Module, get_batch: Callable[[int], Corrupted], budget: Budget | str | int, *, lr: float,
    optimizer: OptimizerName = "adamw",
    checkpoint: Checkpoint | None = None, on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:  # fmt: skip
    """Train in place, warm-up and half a cosine; the model is left in evaluation mode.

    Args:
        model: in float32.
        get_batch: of :func:`lessons`.
        budget: as text, or a number of steps.
        lr: highest learning rate.
        optimizer: ``adamw``, or ``muon`` for the matrices of blocks.
        checkpoint, on_step: see :func:`manyheads.training.fit`.
    """
    return fit(
        model, get_batch, masked_diffusion_loss, budget=budget, optimizers=optimizers_of(model, lr, optimizer),
        schedule=decay("cosine", warmup=0.1, floor=0.1), checkpoint=checkpoint, on_step=on_step,
        tokens_of=lambda batch: batch[0].numel(),
    )  # fmt: skip


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="folder or hub name of a decoder to go on from; none: a small one from scratch")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; a training cut off goes on there")
    parser.add_argument("--text", default="brown", help="prose by name, or files and folders, comma-separated")
    parser.add_argument("--prose", type=float, default=0.25, help="share of the rows that are prose; 0: sums alone")
    parser.add_argument("--terms", type=int, default=3, help="of a sum")
    parser.add_argument("--largest", type=int, default=99, help="number in sums")
    parser.add_argument("--budget", default="3m", help="as 3m, 90s, 2M (tokens) or '700 steps'")
    parser.add_argument("--lengths", default="96,160,288", help="tokens of rows, one after the other")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--lr", type=float, help="highest learning rate; 3e-4 from a decoder, 3e-3 from scratch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.masked_diffusion_lm", description="Train a masked diffusion language model."
    )
    _options(parser)
    args = parser.parse_args(arguments)
    if (args.out / "config.json").exists():
        parser.error(f"{args.out} holds a model; name a new folder")

    def line(state: TrainState) -> None:
        if state.step % 20 == 0 or state.step == 1:
            done, left = min(1.0, state.progress), time_left(state.seconds, state.progress)
            print(f"{done:4.0%} step {state.step}: {float(state.loss):.3f} nats/token {left}", flush=True)

    unfinished = args.out / "training"
    try:
        given = texts(args.text) if args.prose or not args.model else []
        if args.model:
            subject = CausalLM(args.model)
            subject.load(args.device)
            model, tokenizer = subject.model, subject.tokenizer
            precision = next(model.parameters()).dtype
            from_decoder(model.float(), tokenizer)
        else:
            model, tokenizer = small(given, seed=args.seed)
            model, precision = model.to(args.device), torch.float32
        get_batch = lessons(
            model, tokenizer, encoded(given, tokenizer) if args.prose else None, tokens=args.tokens, share=args.prose,
            lengths=[int(part) for part in args.lengths.split(",")], terms=args.terms, largest=args.largest,
            seed=args.seed,
        )  # fmt: skip
        train_denoiser(
            model, get_batch, args.budget, lr=args.lr or (3e-4 if args.model else 3e-3), on_step=line,
            checkpoint=Checkpoint(unfinished, every=200),
        )  # fmt: skip
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    model.to(precision).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    shutil.rmtree(unfinished, ignore_errors=True)
    print(f'{args.out}: write with it: manyheads generate --model {args.out} "What is 4 + 17 - 3?"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
