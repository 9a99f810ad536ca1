# SPDX-License-Identifier: Apache-2.0
"""A vision-language model of DINOv2 and SmolLM2, joined by a projector that is trained: minutes on a GPU.

    python -m manyheads.recipes.joined_vlm --out FOLDER [--attention] [--strategy concentric_attention]

It learns to answer whether an object is in a picture (:mod:`manyheads.data.visual_questions`), under a strategy that
places images if one is named. ``manyheads.models.joined_vlm.load`` reads the folder, which holds what was trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import manyheads
from manyheads.data.scenes import OBJECTS
from manyheads.data.visual_questions import Questions, presence
from manyheads.errors import UserError
from manyheads.models import joined_vlm
from manyheads.models.image_pool import fit_projector
from manyheads.models.joined_vlm import JoinedVLM
from manyheads.progress import time_left
from manyheads.training import Budget, TrainState, decay, fit
from manyheads.training.answers import answer_logits, train_answers

__all__ = ["align", "train_joined"]

_HELD, _AT_ONCE = 256, 32  # texts that are judged
_PATCHES = 2048  # of a step of the alignment
_BACKGROUND = "place"  # what a patch of the photograph is called
OnStep = Callable[[TrainState], bool | None]


def align(
    vlm: JoinedVLM, features: Tensor, cells: Tensor, *, grid: int, cell: int, steps: int, lr: float = 2e-3,
    seed: int = 0,
) -> float:  # fmt: skip
    """Teach a new projector to give patches the embeddings of the words for what they show; the loss at the end.

    No position and no order enters, and neither does the decoder: models that differ in how they place images can begin
    alike. The loss is the squared distance in units of the embeddings' variance; half of the patches show an object.

    Args:
        vlm: its projector, just drawn, is trained.
        features: of pictures, see :func:`manyheads.models.image_pool.image_features`.
        cells: cell of each object in each picture, int64 ``[N, 8]``; -1 where it is not there.
        grid, cell: cells of a side, and patches of a cell's side.
        steps: of the training.
        lr: highest learning rate.
        seed: of the patches of each step.
    """
    fit_projector(vlm, features)
    device, words = features.device, vlm.model.get_input_embeddings().weight.detach()
    named = [vlm.language.encode(word) for word in (*OBJECTS, _BACKGROUND)]
    targets = torch.stack([words[torch.tensor(tokens, device=device)].mean(0) for tokens in named])
    shown = torch.full((len(cells), grid * grid + 1), len(OBJECTS)).scatter(
        1, torch.where(cells < 0, grid * grid, cells), torch.arange(len(OBJECTS)).expand_as(cells)
    )[:, :-1].view(-1, grid, grid)  # fmt: skip
    label = shown.repeat_interleave(cell, 1).repeat_interleave(cell, 2).flatten()
    there = label < len(OBJECTS)
    odds = torch.where(there, 1 / there.sum().clamp(min=1), 1 / (~there).sum().clamp(min=1)).double()
    drawn = torch.multinomial(odds, steps * _PATCHES, True, generator=torch.Generator().manual_seed(seed))
    place, label = drawn.view(steps, -1).to(device), label.to(device)
    patches, unit = features.flatten(0, 1), float(words.var())
    connects = vlm.model.model.multi_modal_projector

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        read, wanted = batch
        made: Tensor = model(read)
        return (made - wanted).square().mean() / unit

    state = fit(
        connects, lambda step: (patches[place[step]], targets[label[place[step]]]), loss, budget=steps,
        optimizers=[torch.optim.AdamW(connects.parameters(), lr=lr, weight_decay=0.0)],
        schedule=decay("cosine", warmup=0.1, floor=0.1), replayed=device.type == "cuda", bf16=False,
    )  # fmt: skip
    return sum(state.losses[-10:]) / len(state.losses[-10:])


def train_joined(
    vlm: JoinedVLM, *, strategy: str = "", grid: int = 6, cell: int = 2, asked: int = 8, filler: int = 64,
    batch: int = 16, budget: Budget | str | int = "3m", lr: float = 2e-3, seed: int = 0, held: int = _HELD,
    on_step: OnStep | None = None,
) -> float:  # fmt: skip
    """Train what of ``vlm`` requires gradients; return the share of questions about new pictures answered rightly.

    Args:
        vlm: on its device.
        strategy: spec of what places the images; empty for the model as it is.
        grid: cells of a picture's side.
        cell: patches of a cell's side.
        asked: questions of a text.
        filler: words between picture and questions, at most.
        batch: texts of a step.
        budget: as in :func:`manyheads.training.fit`.
        lr: highest learning rate of the projector; of the decoder's attention a tenth of it.
        seed: of pictures and words.
        held: texts that are judged.
        on_step: told the state after each step; True ends it.
    """

    def drawn(number: int, count: int, split: str) -> Questions:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        words = int(torch.randint(filler + 1, (), generator=generator))
        return presence(
            vlm.language, count, generator, grid=grid, size=cell * vlm.patch, patches=grid * cell, asked=asked,
            filler=words, split="train" if split == "train" else "test",
        )  # fmt: skip

    with manyheads.use(vlm.model, strategy) if strategy else nullcontext():
        train_answers(
            vlm.model, lambda step: vlm.batch(drawn(step, batch, "train")), budget, lr=lr, slower=0.1,
            on_step=on_step,
        )  # fmt: skip
        no, yes = vlm.language.answers
        right = 0
        for part in range(0, held, _AT_ONCE):
            asks = drawn(part, min(_AT_ONCE, held - part), "test")
            with torch.no_grad():
                logits = answer_logits(vlm.model, vlm.batch(asks)).cpu()
            right += int(((logits[..., yes] > logits[..., no]) == asks.truth).sum())
    return right / (held * asked)


def main(arguments: list[str] | None = None) -> int:
    """Run the recipe."""
    parser = argparse.ArgumentParser(
        "python -m manyheads.recipes.joined_vlm", description="Join a tower and a decoder."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--tower", default=joined_vlm.TOWER, help="folder or hub name of a DINOv2")
    parser.add_argument("--text", default=joined_vlm.TEXT, help="folder or hub name of a decoder of SmolLM2's kind")
    parser.add_argument("--attention", action="store_true", help="train the decoder's attention too")
    parser.add_argument("--strategy", default="", help="what places the images, as concentric_attention")
    parser.add_argument("--budget", default="3m", help="as 3m, 90s or '200 steps'")
    parser.add_argument("--batch", type=int, default=16, help="texts of a step")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate, of the projector")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    if args.out.exists():
        parser.error(f"{args.out} is there already; name a new folder")
    try:
        torch.manual_seed(args.seed)
        vlm = joined_vlm.join(args.tower, args.text, attention=args.attention, device=args.device)

        def on_step(state: TrainState) -> None:
            if state.step % 20 == 0:
                state.look()
                loss = sum(state.losses[-20:]) / 20
                print(f"step {state.step}: {loss:.3f} {time_left(state.seconds, state.progress)}", flush=True)

        right = train_joined(
            vlm,
            strategy=args.strategy,
            batch=args.batch,
            budget=args.budget,
            lr=args.lr,
            seed=args.seed,
            on_step=on_step,
        )
        joined_vlm.save(vlm, args.out, {"strategy": args.strategy, "right": right, "budget": args.budget})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: {right:.1%} of questions about new pictures answered rightly")
    return 0


if __name__ == "__main__":
    sys.exit(main())
