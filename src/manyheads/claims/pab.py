# SPDX-License-Identifier: Apache-2.0
"""Does attention change little in the middle of sampling, least where the pyramid reuses most, and does that order pay?

Films of the shipped Latte (8 frames of 16 x 16, 12 attention modules: 4 within frames, 4 over frames, 4 to the text),
40 steps of flow matching with guidance 3, from the same captions and noise in every arm. Settled before any run:

1. Change. The relative change of a module's output is the mean square of its difference from the step before, over the
   mean square of the output. It is U-shaped if, for each kind, its mean over the first 15 % of the steps and its mean
   over the last 15 % are both more than 1 times its mean between (95 % intervals of both ratios above 1). The order is
   the paper's if the change between is larger for spatial than for temporal and for temporal than for cross-attention
   (intervals of both differences above 0).
2. Order. Outputs are used again at the middle 70 % of the steps, 28 of them. Every arm is judged by the PSNR of its
   films to the uncached ones. The pyramid runs spatial, temporal and cross-attention at every 2nd, 3rd and 6th step
   there (the paper's set for Latte); it has to be nearer than the reversed pyramid 6/3/2, which runs exactly as many
   modules. Modules do not cost the same, spatial ones most, so that the reversed pyramid computes less. So it also has
   to be nearer than the reversed one of equal compute: of all n with spatial > temporal > cross, up to 6, the cheapest
   that computes at least as many FLOPs of attention as the pyramid (intervals of both paired differences above 0).

The claim holds if 1 and 2 hold in every part. Intervals are over seeds and captions. Beside it stand other sets of n,
each kind used again alone, and diffusers' PyramidAttentionBroadcast at the pyramid's settings: with both branches in
one batch, where it must be the same, and with one call for each, where it hands one branch the other's outputs.
The range begins at a step that 2, 3 and 6 divide, so that all ways of counting begin alike.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyheads.claims import Claim, Figure, Outcome, Setting, Verdict
from manyheads.claims._broadcast import KINDS, Every

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from manyheads.models.scenes import ScenePipeline

STEPS, GUIDANCE, UPPER, LOWER = 40, 3.0, 850.0, 150.0
EDGE = 6  # 15 % of the steps
PYRAMID: Every = (2, 3, 6)
REVERSED: Every = (6, 3, 2)
SAME_MODULES, SAME_FLOPS = "reversed, as many modules", "reversed, equal FLOPs"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is generated: captions, of which so many at a time, and how many for diffusers' own."""

    captions: int
    batch: int
    peers: int
    others: dict[str, Every]


def scale(setting: Setting) -> Scale:
    """The size of a run: quick in 30 s on two cores, full in ten minutes, on a GPU in three."""
    if setting.quick:
        return Scale(3, 1, 1, {})
    others: dict[str, Every] = {
        "uniform": (3, 3, 3), "2/4/6": (2, 4, 6), "spatial alone": (3, 1, 1), "temporal alone": (1, 3, 1),
        "cross alone": (1, 1, 3),
    }  # fmt: skip
    return Scale(12, 2, 2, others) if setting.device == "cpu" else Scale(96, 32, 16, others)


def runs_of(n: int) -> int:
    """How many of the 28 steps of the range a module is run at."""
    return sum(step % n == 0 or step == EDGE for step in range(EDGE, STEPS - EDGE))


def cost(every: Every, flops: dict[str, float]) -> float:
    """FLOPs of attention in the range."""
    return sum(runs_of(n) * flops[kind] for n, kind in zip(every, KINDS, strict=True))


def equal_compute(flops: dict[str, float]) -> Every:
    """The cheapest reversed pyramid that computes no less than the pyramid."""
    sets = [(a, b, c) for a in range(3, 7) for b in range(2, a) for c in range(1, b)]
    return min((s for s in sets if cost(s, flops) >= cost(PYRAMID, flops)), key=lambda s: cost(s, flops))


def spec(every: Every) -> str:
    """The strategy that runs attention at every n-th step of the range."""
    spatial, temporal, cross = every
    return f"pab:spatial={spatial},temporal={temporal},cross={cross},upper={UPPER},lower={LOWER}"


class Bed:
    """The model, its captions and its noise."""

    def __init__(self, setting: Setting, size: Scale) -> None:
        import torch

        from manyheads.data.scenes import VOCABULARY, tokens
        from manyheads.models.scenes import load_scenes

        self.pipe: ScenePipeline = load_scenes("moving", setting.device)
        self.seeds = setting.seeds
        sizes = [len(words) for words in VOCABULARY["moving"].values()]
        every = torch.cartesian_prod(*(torch.arange(n) for n in sizes))
        self.labels = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: size.captions]]
        self.tokens = tokens(self.labels, "moving")
        self.batch = size.batch
        self.noise = {
            seed: self.pipe.noise(size.captions, torch.Generator().manual_seed(seed)) for seed in setting.seeds
        }

    def film(self, pipe: "ScenePipeline", seed: int, rows: slice) -> "Tensor":
        """Films of some captions, 0..1, ``[N, 3, F, H, W]`` on the CPU."""
        made = pipe(
            self.tokens[rows], num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=self.noise[seed][rows],
            output_type="pt",
        )  # fmt: skip
        films: Tensor = made.frames.cpu()
        return films

    def queries(self, films: int) -> int:
        """Queries of all attention modules in uncached runs."""
        from manyheads.data.scenes import FRAMES, WINDOW

        config = self.pipe.transformer.config
        tokens = FRAMES * (WINDOW // int(config.patch_size)) ** 2
        each = int(config.num_layers) * tokens * STEPS * 2  # rows with and without the caption
        return len(KINDS) * each * films

    def parts(self, count: int) -> "list[tuple[int, slice]]":
        """Seed and captions of every call of the pipeline that ``count`` captions take."""
        at = range(0, count, self.batch)
        return [(seed, slice(i, min(i + self.batch, count))) for seed in self.seeds for i in at]


def uncached(bed: Bed, count: int) -> "tuple[Tensor, dict[str, np.ndarray[Any, Any]]]":
    """Films of every seed and caption, and how much attention changes, ``[seeds, calls, steps]`` by kind."""
    import numpy as np
    import torch

    import manyheads

    films, changes = [], []
    for seed, rows in bed.parts(count):
        measure: Any = manyheads.parse("pab.redundancy")
        with manyheads.use(bed.pipe, measure) as port:
            films.append(bed.film(bed.pipe, seed, rows))
        changes.append({curve.kind: curve.relative for curve in measure.curves(port)})
    shape = (len(bed.seeds), -1, STEPS - 1)
    return torch.cat(films), {kind: np.array([each[kind] for each in changes]).reshape(shape) for kind in KINDS}


def cached(bed: Bed, every: Every, count: int) -> "Tensor":
    """The films under ``pab``."""
    import torch

    import manyheads

    with manyheads.use(bed.pipe, spec(every)):
        return torch.cat([bed.film(bed.pipe, seed, rows) for seed, rows in bed.parts(count)])


def judged_change(figures: list[Figure], changes: "dict[str, np.ndarray[Any, Any]]") -> tuple[bool, bool, str]:
    """Whether the change is U-shaped and in the paper's order, with the reason."""
    import numpy as np

    from manyheads.claims._toys import measured

    between, lowest, shaped = {}, [], True
    for kind, change in changes.items():
        first, middle, last = (part.mean(-1) for part in np.split(change, [EDGE, STEPS - 1 - EDGE], axis=-1))
        between[kind] = middle
        measured(figures, f"relative change of {kind} attention, middle steps", middle)
        for name, edge in (("first", first), ("last", last)):
            ratio = measured(figures, f"{kind}: {name} 15 % of the steps over the middle", edge / middle)
            shaped &= ratio.low > 1
            lowest.append((ratio.value, f"{kind} at the {name} steps {ratio.value:.2g} times"))
    ordered = True
    for more, less in (("spatial", "temporal"), ("temporal", "cross")):
        gap = measured(figures, f"change of {more} minus {less}, middle steps", between[more] - between[less])
        ordered &= gap.low > 0
    sizes = ", ".join(f"{kind} {value.mean():.2g}" for kind, value in between.items())
    reason = (
        f"Change is {'' if shaped else 'not '}U-shaped (least: {min(lowest)[1]} the middle) and "
        f"{'' if ordered else 'not '}in the paper's order ({sizes} a step)"
    )
    return shaped, ordered, reason


def judged_order(
    figures: list[Figure], near: "dict[str, Tensor]", sets: dict[str, Every]
) -> tuple[bool, str]:  # fmt: skip
    """Whether the pyramid's films are nearer to the uncached ones than the reversed pyramids', with the reason."""
    from manyheads.claims._toys import measured

    for name, values in near.items():
        measured(figures, f"PSNR to uncached, {name} {'/'.join(map(str, sets[name]))}", values, "dB")
    gaps = {
        name: measured(figures, f"PSNR of the pyramid minus {name}", near["pyramid"] - near[name], "dB")
        for name in near
        if name != "pyramid"
    }
    told = [f"{gaps[name].value:+.1f} dB against {name}" for name in (SAME_MODULES, SAME_FLOPS)]
    holds = all(gaps[name].low > 0 for name in (SAME_MODULES, SAME_FLOPS))
    reason = f"the pyramid is {'nearer' if holds else 'not nearer'} to the uncached films ({', '.join(told)})"
    if "uniform" in gaps:  # not part of the claim, but who reads the verdict has to know it
        reason += f", and {gaps['uniform'].value:+.1f} dB against {'/'.join(map(str, sets['uniform']))} throughout"
    return holds, reason


def words(bed: Bed, films: "dict[str, Tensor]", figures: list[Figure]) -> None:
    """How many words of the captions the judge sees in the films."""
    from manyheads.claims._toys import measured
    from manyheads.data.scenes import VOCABULARY
    from manyheads.models.judge import load_judge

    judge, _ = load_judge("moving")
    for name, made in films.items():
        seen = judge.see(made)
        for kind in VOCABULARY["moving"]:
            right = seen.right(bed.labels.repeat(len(bed.seeds), 1), kind).unflatten(0, (len(bed.seeds), -1))
            measured(figures, f"{kind} as the caption has it, {name}", right)


def peers(bed: Bed, plain: "Tensor", figures: list[Figure], count: int) -> str:
    """Diffusers' own at the same settings, beside ours: in one batch, and with a call for each branch."""
    import torch

    import manyheads
    from manyheads.claims._broadcast import apart, computed, diffusers_pab, psnr

    n, unlike = len(plain), {}
    for calls, pipe in (("one batch", bed.pipe), ("two calls", apart(bed.pipe))):
        ways: dict[str, Any] = {
            "ours": lambda pipe=pipe: manyheads.use(pipe, spec(PYRAMID)),
            "diffusers": lambda pipe=pipe: diffusers_pab(pipe, PYRAMID, UPPER, LOWER),
        }
        if calls == "one batch":
            ways["diffusers, default names"] = lambda pipe=pipe: diffusers_pab(pipe, PYRAMID, UPPER, LOWER, named=False)
        made = {}
        for name, way in ways.items():
            films = []
            with computed(bed.pipe.transformer) as counts:
                for seed, rows in bed.parts(count):
                    with way():
                        films.append(bed.film(pipe, seed, rows))
            made[name] = torch.cat(films)
            figures.append(Figure(f"PSNR, {calls}, {name}", float(psnr(made[name], plain).mean()), n, unit="dB"))
            share = sum(counts.values()) / bed.queries(n)
            figures.append(Figure(f"attention modules computed, {calls}, {name}", share, n))
        unlike[calls] = float((made["diffusers"] - made["ours"]).abs().max())
        figures.append(Figure(f"largest difference of a pixel, {calls}, diffusers and ours", unlike[calls], n))
    return (
        f"Diffusers' own differs from ours by at most {unlike['one batch']:.1g} of a pixel's range with both branches "
        f"in one batch, by up to {unlike['two calls']:.2g} with a call for each"
    )


def run(setting: Setting) -> Outcome:
    """Generate under every arm, and judge."""
    from manyheads.claims._broadcast import flops, psnr, ssim
    from manyheads.claims._toys import measured

    size = scale(setting)
    bed = Bed(setting, size)
    count, figures = size.captions, list[Figure]()
    setting.progress("films without a cache", 0.0)
    plain, changes = uncached(bed, count)
    shaped, ordered, change = judged_change(figures, changes)
    each = flops(bed.pipe, bed.noise[setting.seeds[0]][:1])
    sets = {"pyramid": PYRAMID, SAME_MODULES: REVERSED, SAME_FLOPS: equal_compute(each), **size.others}
    films, near = {"uncached": plain}, {}
    for i, (name, every) in enumerate(sets.items()):
        setting.progress(f"films under {name}", (1 + i) / (2 + len(sets)))
        made = cached(bed, every, count)
        near[name] = psnr(made, plain).unflatten(0, (len(setting.seeds), -1))
        measured(figures, f"SSIM to uncached, {name}", ssim(made, plain).unflatten(0, (len(setting.seeds), -1)))
        saved = sum((28 - runs_of(n)) * each[kind] for n, kind in zip(every, KINDS, strict=True)) / STEPS
        modules = 1 - sum(28 - runs_of(n) for n in every) / (3 * STEPS)
        figures.append(Figure(f"attention modules computed, {name}", modules, 1))
        figures.append(Figure(f"FLOPs of attention, {name}", 1 - saved / sum(each[kind] for kind in KINDS), 1))
        figures.append(Figure(f"FLOPs of the model, {name}", 1 - saved / each["model"], 1))
        if name in ("pyramid", SAME_MODULES, SAME_FLOPS):
            films[name] = made
    holds, order = judged_order(figures, near, sets)
    words(bed, films, figures)
    setting.progress("diffusers' own", (1 + len(sets)) / (2 + len(sets)))
    picked = [at for i in range(len(setting.seeds)) for at in range(i * count, i * count + size.peers)]
    own = peers(bed, plain[picked], figures, size.peers)
    verdict: Verdict = "holds" if shaped and ordered and holds else "does not hold here"
    return Outcome(verdict, f"{change}; {order}. {own}.", tuple(figures))


claim = Claim(
    slug="pab",
    statement=(
        "Attention outputs change less in the middle of sampling than at its ends, most within frames, less over time, "
        "least to the text; and reuse in that order keeps films nearer to the uncached ones than reversed, at an equal "
        "number of modules computed and at equal FLOPs."
    ),
    paper_figure=(
        "Latte, 8 GPUs against one: 80.5 s to 9.2 s (8.7x) with sequence parallelism; on one GPU about 1.3x. Change of "
        "outputs U-shaped over the steps, flat in the middle 70 %, spatial > temporal > cross."
    ),
    run=run,
)
