# SPDX-License-Identifier: Apache-2.0
"""Gists for ``gist``, trained on a model with LoRA: minutes on a GPU.

    python -m manyheads.recipes.gist --model MODEL --out FOLDER [--ratio 4] [--coarse] [--ae 1] [--tie] [--budget 5m]

The loss is that of the next token of ordinary text in segments, of which later ones see gists alone; with ``--ae`` a
weak decoder must give back from each gist the tokens that it stands for, with ``--tie`` tokens count by how much they
need the context. The same command goes on with a training that was cut off.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import manyheads
from manyheads.attention import reference
from manyheads.caches.gist import Gists, Segments
from manyheads.caches.gist.losses import WeakDecoder, context_weights
from manyheads.caches.gist.one_pass import GistPass
from manyheads.errors import UserError
from manyheads.integrations.transformers import find_sites
from manyheads.recipes._adapters import add_options, frozen, run_training
from manyheads.training import Budget, Checkpoint, TrainState, decay, fit

__all__ = ["new_gists", "train_gists"]

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj")  # that LoRA changes
OnStep = Callable[[TrainState, dict[str, float]], bool | None]


def new_gists(
    model: nn.Module, segments: Segments, *, own: Iterable[str] = ("q_proj", "k_proj", "v_proj"), lora: int = 16,
    seed: int = 0,
) -> Gists:  # fmt: skip
    """Untrained gists of ``model``, on its device.

    Their embedding is that of the token that ends a text, or the mean of all.

    Args:
        model: a decoder of transformers.
        segments: their geometry.
        own: linear layers in which gists have projections of their own, as ``q_proj``.
        lora: rank of LoRA on the projections of attention; 0 for none.
        seed: of LoRA.

    Raises:
        UserError: the model has no linear layers of these names.
    """
    known: Any = model
    blocks = tuple(site.name + "." for site, _ in find_sites(model) if site.causal)
    layers = {
        name: (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(blocks) and name.rpartition(".")[2] in _LINEAR
    }
    if not layers:
        raise UserError(f"gist trains {', '.join(_LINEAR)}, and {type(model).__name__} has no such layers")
    table = known.get_input_embeddings().weight.detach().float()
    end = known.config.get_text_config().eos_token_id
    end = end[0] if isinstance(end, (list, tuple)) else end
    embedding = (table.mean(0) if end is None else table[end])[None]
    if segments.granularity == "coarse":
        embedding = embedding.expand(segments.gists, -1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gists(segments, embedding.cpu(), layers, own, lora).to(table.device)


def train_gists(
    model: nn.Module, get_batch: Callable[[int], Tensor], *, segments: Segments, ae: float = 0.0, tie: bool = False,
    gamma: float = 2.0, own: Iterable[str] = ("q_proj", "k_proj", "v_proj"), lora: int = 16,
    budget: Budget | str | int = "5m", lr: float = 1e-3, most: int = 2048, replayed: bool = False, seed: int = 0,
    checkpoint: Checkpoint | None = None, on_step: OnStep | None = None,
) -> Gists:  # fmt: skip
    """Gists of ``model``, which stays as it is: what changes of it is LoRA, in force while ``gist`` is in use.

    Args:
        model: a decoder of transformers, on its device.
        get_batch: ids ``[B, T + 1]`` by the number of the step; T is a multiple of a segment where ``tie``.
        segments: the geometry.
        ae: factor of the autoencoding loss; 0 for none.
        tie: weigh tokens by importance.
        gamma: most nats that count in a token's importance.
        own, lora, seed: see :func:`new_gists`.
        budget: as in :func:`manyheads.training.fit`.
        lr: highest learning rate, of AdamW; of projections of gists' own a fifth of it.
        most: gists of a batch that the weak decoder reads, at most.
        replayed: record a step as a CUDA graph.
        checkpoint: where checkpoints go; training goes on from one.
        on_step: told the state and figures of the step: ``text`` and ``ae`` in nats per token, ``back`` the share of
            tokens that the weak decoder gives back; True ends it.
    """
    known: Any = model
    gists = new_gists(model, segments, own=own, lora=lora, seed=seed)
    sites = [site for site, _ in find_sites(model) if site.causal]
    table, head, device = known.get_input_embeddings(), known.get_output_embeddings(), gists.embedding.device
    decoder = None
    if ae:
        heads, kv_heads = sites[0].num_heads, sites[0].num_kv_heads
        assert heads is not None and kv_heads is not None
        width = table.weight.shape[1]
        dim = getattr(known.config.get_text_config(), "head_dim", None) or width // heads
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = float(head.weight.detach().float().norm(dim=1).mean())
            decoder = WeakDecoder(width, heads, kv_heads, dim, len(sites), segments.ratio, size).to(device)
    reading = GistPass(trained=gists, gather=ae > 0)
    seen: dict[str, Tensor] = {}

    def plain(ids: Tensor) -> Tensor:
        gists.now.off = True
        try:
            # With a mask of its own the model does not wait for the device to ask whether texts are packed.
            mask = reference.causal_mask(ids.shape[1], ids.shape[1], ids.device)[None, None]
            logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits
        finally:
            gists.now.off = False

    def loss(_: nn.Module, ids: Tensor) -> Tensor:
        weights = context_weights(plain, ids, segments.length, gamma) if tie else None
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        nats = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
        total = nats.mean() if weights is None else (weights * nats).sum(1).mean()
        seen["text"] = nats.detach().mean()
        if decoder is not None:
            piece = reading.latest[0]
            assert piece.keys is not None and piece.values is not None
            covered = (ids.shape[1] - 1) // segments.length * segments.length
            found, back = decoder.loss(
                piece.keys, piece.values, ids[:, :covered], table, lambda h: head(h.to(head.weight.dtype)), most
            )  # fmt: skip
            total = total + ae * found
            seen["ae"], seen["back"] = found.detach(), back.detach()
        return total

    own_parameters = list(gists.projections.parameters())
    others = [p for name, p in gists.named_parameters() if not name.startswith("projections.")]
    others += [] if decoder is None else list(decoder.parameters())
    groups = [{"params": others, "lr": lr}] + [{"params": own_parameters, "lr": lr / 5}] * bool(own_parameters)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    state = TrainState(Budget.of(budget))
    trained = nn.ModuleList([gists] if decoder is None else [gists, decoder])
    with frozen(model), manyheads.use(model, reading):
        fit(
            trained, get_batch, loss, budget=state, optimizers=[optimizer], checkpoint=checkpoint, replayed=replayed,
            schedule=decay("cosine", warmup=0.1, floor=0.1),
            on_step=None if on_step is None else lambda now: on_step(now, {k: float(x) for k, x in seen.items()}),
        )  # fmt: skip
    gists.about = {
        "model": type(model).__name__, "steps": state.step, "ae": ae, "tie": tie, "gamma": gamma,
        **{name: float(x) for name, x in seen.items()},
    }  # fmt: skip
    return gists.requires_grad_(False)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser("python -m manyheads.recipes.gist", description="Train gist tokens.")
    add_options(parser, of="gists", lr=1e-3)
    parser.add_argument("--ratio", type=int, default=4, help="tokens that a gist stands for")
    parser.add_argument("--segment", type=int, default=256, help="tokens of a segment")
    parser.add_argument("--coarse", action="store_true", help="gists behind their segment, not among its tokens")
    parser.add_argument("--positions", choices=("compressed", "original"), default="compressed")
    parser.add_argument("--own", default="q_proj,k_proj,v_proj", help="projections that gists have of their own, or ''")
    parser.add_argument("--lora", type=int, default=16, help="rank of LoRA on the model's attention; 0 for none")
    parser.add_argument("--ae", type=float, default=0.0, help="factor of the autoencoding loss")
    parser.add_argument("--tie", action="store_true", help="weigh tokens by how much they need the context")
    parser.add_argument("--replayed", action="store_true", help="steps as a CUDA graph; cannot go on if cut off")
    parser.add_argument("--gamma", type=float, default=2.0, help="most nats that count in a token's importance")
    args = parser.parse_args(arguments)
    if (args.out / "gists.json").exists():
        parser.error(f"{args.out} holds gists; name a new folder")
    return run_training(
        args,
        lambda model, get_batch, line, checkpoint: train_gists(
            model, get_batch, ae=args.ae, tie=args.tie, gamma=args.gamma, lora=args.lora, budget=args.budget,
            own=[name for name in args.own.split(",") if name], lr=args.lr, seed=args.seed, replayed=args.replayed,
            segments=Segments(
                length=args.segment, ratio=args.ratio, granularity="coarse" if args.coarse else "fine",
                positions=args.positions,
            ),
            on_step=lambda state, seen: line(state, ", ".join(f"{name} {x:.3f}" for name, x in seen.items())),
            checkpoint=None if args.replayed else checkpoint,
        ),
        lambda gists: f"a gist for {args.ratio} tokens; use it as gist:gists={args.out}",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
