# SPDX-License-Identifier: Apache-2.0
"""RECALL: a model of 361 thousand parameters that recalls 100 key-value pairs, each needed exactly once.

    python -m manyheads.recipes.recall --out DIR [--seconds 60] [--smoke]

The probe for whatever a cache forgets: a lost pair is a wrong answer, and nothing else is. Sequences are
``k1 v1 ... kn vn`` with distinct keys in 8..127 and values in 128..255, then the same pairs in another order; after
each key the model predicts its value. Batches of this alternate with random sequences repeated once. Both begin with
8 and double, up to 100, whenever both are right nine times in ten: without the repeated sequences, the large
initialisation or the growing length, nothing is learned.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.models import packed
from manyheads.recipes import _card
from manyheads.recipes._llama import Llama
from manyheads.training import Budget, TrainState, decay, fit

FIRST_KEY, FIRST_VALUE, VOCAB = 8, 128, 256
PAIRS = 100


def config() -> LlamaConfig:
    """Return the architecture in transformers' terms."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def pairs(batch: int, n: int, generator: Generator, device: str) -> tuple[Tensor, Tensor]:
    """Return (tokens, loss_mask), [batch, 4n] each: n pairs, then the same pairs shuffled, whose values count."""
    random = torch.rand(2, batch, FIRST_VALUE - FIRST_KEY, generator=generator, device=device)
    keys = random[0].argsort(-1)[:, :n] + FIRST_KEY
    values = torch.randint(FIRST_VALUE, VOCAB, (batch, n), generator=generator, device=device)
    first = torch.stack((keys, values), -1)  # [batch, n, 2]
    order = random[1, :, :n].argsort(-1)[..., None].expand(-1, -1, 2)
    tokens = torch.cat((first, first.gather(1, order)), 1).flatten(1)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, 2 * n + 1 :: 2] = True
    return tokens, loss_mask


def repeats(batch: int, n: int, generator: Generator, device: str) -> tuple[Tensor, Tensor]:
    """Return (tokens, loss_mask), [batch, 2n] each: n random tokens, then the same again, which count."""
    once = torch.randint(FIRST_KEY, VOCAB, (batch, n), generator=generator, device=device)
    tokens = torch.cat((once, once), 1)
    loss_mask = torch.zeros_like(tokens, dtype=torch.bool)
    loss_mask[:, n + 1 :] = True
    return tokens, loss_mask


def train(
    seconds: float, largest: int, seed: int, device: str, batch_tokens: int
) -> tuple[Llama, list[dict[str, Any]]]:
    """Train for ``seconds`` or until no one of ``largest`` pairs is lost; return the model and its curve."""
    torch.manual_seed(seed)
    generator = Generator(device).manual_seed(seed)
    model = Llama(config(), torch.bfloat16 if device == "cuda" else torch.float32, zero_output=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    size, right = 8, {pairs: 0.0, repeats: 0.0}
    curve: list[dict[str, Any]] = []

    def get_batch(number: int) -> tuple[Tensor, Tensor]:
        task = (pairs, repeats)[number % 2]
        return task(max(1, min(1024, batch_tokens // (4 * size))), size, generator, device)

    def loss(called: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, loss_mask = batch
        logits, targets = called(tokens[:, :-1])[loss_mask[:, 1:]].float(), tokens[loss_mask]
        if (state.step + 1) % 10 < 2:
            right[(pairs, repeats)[state.step % 2]] = (logits.argmax(-1) == targets).float().mean().item()
        return F.cross_entropy(logits, targets)

    def on_step(state: TrainState) -> bool:
        nonlocal size, right
        if state.step % 10 != 1:
            return False
        curve.append({
            "steps": state.step, "seconds": round(state.seconds, 2), "pairs": size,
            "recalled": round(right[pairs], 4), "repeated": round(right[repeats], 4),
        })  # fmt: skip
        if state.step % 100 == 1:
            print(curve[-1], flush=True)
        if min(right.values()) > 0.9 and size < largest:
            size, right = min(2 * size, largest), dict.fromkeys(right, 0.0)
            return False
        return size == largest and min(row["recalled"] for row in curve[-10:]) == 1

    state = TrainState(Budget(seconds, "seconds"))
    schedule = decay("none", warmup=100)
    fit(model, get_batch, loss, budget=state, optimizers=[optimizer], schedule=schedule, bf16=False, on_step=on_step)
    return model, curve


@torch.inference_mode()
def accuracy(model: LlamaForCausalLM, n: int, sequences: int, seed: int) -> float:
    """Share of values recalled after their keys, over ``sequences`` sequences of ``n`` pairs."""
    generator = Generator(model.device).manual_seed(seed)
    right = 0
    for begin in range(0, sequences, 64):
        tokens, loss_mask = pairs(min(64, sequences - begin), n, generator, str(model.device))
        best = model(input_ids=tokens[:, :-1], use_cache=False).logits.argmax(-1)
        right += int((best == tokens[:, 1:])[loss_mask[:, 1:]].sum())
    return right / (n * sequences)


def make(out: Path, seconds: float, seed: int, smoke: bool) -> dict[str, Any]:
    """Run the whole recipe; return what results.json holds. ``out`` must not exist yet."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    largest, sequences = (8, 8) if smoke else (PAIRS, 1000)
    trained, curve = train(seconds, largest, seed, device, 1024 if smoke else 100_000)
    model: Any = trained.to_transformers(torch.bfloat16)
    model.to(device)
    results = {
        "pairs": largest, "sequences": sequences, "recalled": accuracy(model, largest, sequences, seed + 1),
        "steps": curve[-1]["steps"], "seconds": curve[-1]["seconds"], "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters()), "environment": _card.environment(device),
    }  # fmt: skip
    staging = out.with_name(f"{out.name}.partial")
    model.config.save_pretrained(staging)
    packed.save(model, staging)
    (staging / "results.json").write_text(json.dumps(results, indent=1))
    (staging / "curves.json").write_text(json.dumps(curve))
    (staging / "README.md").write_text(_card.render("recall", results))
    staging.rename(out)
    return results


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.recall", description="Train the RECALL fixture.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; must not exist")
    parser.add_argument("--seconds", type=float, default=60, help="training time at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="the whole path at toy size, in seconds on a CPU")
    args = parser.parse_args(argv)
    if args.out.exists():
        parser.error(f"{args.out} exists; name a new folder")
    results = make(args.out, 5 if args.smoke else args.seconds, args.seed, args.smoke)
    print(f"{results['recalled']:.4f} of {results['pairs']} pairs recalled; {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
