# SPDX-License-Identifier: Apache-2.0
"""Does a target that reads its source's keys and values late keep the source's looks and its own layout?

The MMDiT of scenes (six blocks), with captions: of 64 objects it puts all where the caption says, the UNet 86 %. So
attention is joint, and what is exchanged is the image tokens', which the paper does not treat. Source and target ask
for the same object and backdrop with the object in another quarter, and start from the same noise. What must be kept is
the photograph outside both quarters (PSNR of the target against its source there); what must change is the object's
place, as the judge sees it.

Set down before the first run: the paper's S = 4 of 50 steps and L = 10 of 16 blocks are here step 1 of 12 and block 4
of 6. The claim holds if, with these, the PSNR is higher than without control, the object stands where the target's
caption says not more than ten points less often than without control, and more often than with control from the first
step in all blocks, which copies the source. Each by a paired 95 % interval over pairs. Other steps and blocks and the
union variant are reported; nothing is chosen by them. Masks need cross-attention of its own.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    from torch import Tensor

LATE, COPY = "step 1, block 4", "step 0, block 0"
ARMS = {
    "no control": None,
    LATE: "masactrl:start_step=1,start_layer=4",
    COPY: "masactrl:start_step=0,start_layer=0",
    "step 1, block 0": "masactrl:start_step=1,start_layer=0",
    "step 0, block 4": "masactrl:start_step=0,start_layer=4",
    "step 4, block 4": "masactrl:start_step=4,start_layer=4",
    "step 4, block 0": "masactrl:start_step=4,start_layer=0",
    f"{LATE}, union": "masactrl:start_step=1,start_layer=4,union=true",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Size:
    """Pairs of each seed, denoising steps, and arms."""

    pairs: int
    steps: int
    arms: tuple[str, ...]


def size(setting: Setting) -> Size:
    """Quick in 30 s on two cores, in full ten minutes; on a GPU three."""
    if setting.quick:
        return Size(16, 12, ("no control", LATE, COPY))
    return Size(96 if setting.device == "cpu" else 1024, 12, tuple(ARMS))


def captions(pairs: int, seed: int) -> "tuple[Tensor, Tensor]":
    """Labels of sources and of their targets, which differ in the place alone, ``[pairs, 3]`` each."""
    import torch

    from manyheads.claims._scenes import drawn

    source = drawn(pairs, seed)
    target = source.clone()
    turn = torch.randint(1, 4, (pairs,), generator=torch.Generator().manual_seed(seed + 1))
    target[:, 1] = (source[:, 1] + turn) % 4
    return source, target


def kept(source: "Tensor", target: "Tensor", places: "Tensor") -> "Tensor":
    """PSNR in dB of ``target [N, 3, H, W]`` against ``source`` outside the quarters ``places [N, 2]``: ``[N]``."""
    import torch

    half = source.shape[-1] // 2
    outside = torch.ones(len(source), 1, *source.shape[-2:])
    for column in places.T:
        for i, place in enumerate(column.tolist()):
            row, at = place // 2 * half, place % 2 * half
            outside[i, :, row : row + half, at : at + half] = 0
    error = ((source - target).square() * outside).sum((1, 2, 3)) / (3 * outside.sum((1, 2, 3)))
    return -10 * error.clamp(min=1e-10).log10()


def run(setting: Setting) -> Outcome:
    """Make sources and targets under every arm, and judge."""
    import torch

    from manyheads.claims._scenes import Bed, paired

    how = size(setting)
    bed = Bed.of(setting, "scenes", how.steps, 3.0)
    bed.batch = 2 * how.pairs
    psnr: dict[str, Tensor] = {}
    placed: dict[str, Tensor] = {}
    named: dict[str, Tensor] = {}
    for number, arm in enumerate(how.arms):
        values = []
        for i, seed in enumerate(setting.seeds):
            source, target = captions(how.pairs, 300 + seed)
            made = bed.make(
                torch.cat([source, target]), ARMS[arm], 2 * how.pairs, 400 + seed, lambda _: None,
                lambda noise: torch.cat([noise[: len(noise) // 2]] * 2),
            )  # fmt: skip
            first, second = made.chunk(2)
            seen = bed.judge.see(second)
            places = torch.stack([source[:, 1], target[:, 1]], 1)
            values.append((kept(first, second, places), seen.right(target, "place"), seen.right(target, "object")))
            setting.progress(arm, (number + (i + 1) / len(setting.seeds)) / len(how.arms))
        psnr[arm], placed[arm], named[arm] = (torch.cat(each) for each in zip(*values, strict=True))
    figures: list[Figure] = []
    for arm in how.arms:
        paired(figures, f"PSNR of what is kept, {arm}", psnr[arm], "dB")
        paired(figures, f"object where the target says, {arm}", placed[arm])
        paired(figures, f"object that the target says, {arm}", named[arm])
    more = paired(figures, "PSNR, late control minus none", psnr[LATE] - psnr["no control"], "dB")
    lost = paired(figures, "place, late control minus none", placed[LATE] - placed["no control"])
    copied = paired(figures, "place, late control minus from the start", placed[LATE] - placed[COPY])
    holds = more.low > 0 and lost.low > -0.1 and copied.low > 0
    reason = (
        f"Outside both quarters the target is {psnr[LATE].mean():.1f} dB from its source with late control, "
        f"{psnr['no control'].mean():.1f} dB without and {psnr[COPY].mean():.1f} dB with control from the start; the "
        f"object stands where it should in {placed[LATE].mean():.0%}, {placed['no control'].mean():.0%} and "
        f"{placed[COPY].mean():.0%}."
    )
    return Outcome("holds" if holds else "does not hold here", reason, tuple(figures))


claim = Claim(
    slug="masactrl",
    statement=(
        "Mutual self-attention from an early step on, in late blocks, keeps more of the source picture than its noise "
        "and caption alone do, while the object still moves to where the target's caption says; in all blocks from the "
        "first step on it copies the source."
    ),
    paper_figure="No figures: pictures of Stable Diffusion edits; S = 4 of 50 steps, L = 10 of 16 blocks.",
    run=run,
)
