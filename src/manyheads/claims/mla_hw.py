# SPDX-License-Identifier: Apache-2.0
"""Is latent attention cheaper to decode without expanding its cache, and does a roofline model know when it is not?

The paper models accelerators in simulation; here the machine at hand is measured. Peak FLOP/s, bandwidth and the time
of a launch are calibrated with one product, one copy and one tiny product; the times of the schedules the model must
predict, and is never fitted to. On a GPU times are those of the device: work is queued behind a long product, so that
gaps of the launching host do not count; only the time of a whole decoding step has the host in it.

The verdict was fixed beforehand. It *holds* if all of these do: one decoded token costs at least ``CHEAPER`` times less
absorbed than expanded at the longest cache and largest batch; the model names the faster of the two in at least
``AGREE`` of the cells of the grid; the schedule it names costs on average at most ``REGRET`` more than the better one;
an unmodified model decodes faster with ``mla_hw`` than without (95 % interval of the ratio above 1) and says the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any

from manyheads.claims._old import Claim, Figure, Outcome, Setting

if TYPE_CHECKING:
    import torch

    from manyheads.attention.mla import Dims, Platform, Schedule

CHEAPER = 10.0
AGREE = 0.9
REGRET = 0.1
SAME = {"cpu": 1e-4, "cuda": 2e-2}  # relative error of logits: float32 and bfloat16
GOAL = 1.2  # attention inside the model over the bare operator; reported, not judged
WAYS: "tuple[Schedule, ...]" = ("expand", "absorb")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured: sizes of the layer, of the grid, and of the model that decodes."""

    sizes: tuple[int, int, int, int, int, int]  # heads, rank, nope, rope, value and query-latent channels
    batches: tuple[int, ...]
    queries: tuple[int, ...]
    lengths: tuple[int, ...]
    sweep: tuple[int, ...]  # queries per row around the crossover
    hidden: int
    steps: int  # per seed


def scale(setting: Setting) -> Scale:
    """A quarter of DeepSeek-V3's channels and an eighth of its heads on a CPU, its real layer on a GPU."""
    if setting.device == "cpu":
        lengths, sweep = ((256, 1024), ()) if setting.quick else ((256, 1024, 4096), tuple(range(8, 129, 8)))
        return Scale((16, 128, 32, 16, 32, 384), (1, 4), (1, 4, 16, 64, 256), lengths, sweep, 256, 8)
    lengths, sweep = (1024, 4096) if setting.quick else (1024, 4096, 16384), tuple(range(32, 513, 32))
    return Scale((128, 512, 128, 64, 128, 1536), (1, 8), (1, 4, 16, 64, 256, 1024), lengths, sweep, 7168, 10)


class Bench:
    """A device, and how long work on it takes."""

    def __init__(self, device: str, dims: "Dims") -> None:
        import torch

        self.device, self.dims = device, dims
        self.projected = replace(dims, q_rank=0)  # queries come projected, as in a model
        self.like = torch.empty(0, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
        self._filler = torch.zeros(8192, 8192, dtype=torch.bfloat16, device=device) if device == "cuda" else None

    def queue(self, products: int = 1) -> None:
        """Keep the device busy for milliseconds, so that what comes next is launched before it can start."""
        if self._filler is not None:
            for _ in range(products):
                self._filler @ self._filler

    def wait(self) -> None:
        """Wait until the device is done."""
        if self._filler is not None:
            import torch

            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A moment in the order of the device's work."""
        if self._filler is None:
            return perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Seconds between two marks that are both past."""
        return float(end - begin if self._filler is None else begin.elapsed_time(end) / 1e3)

    def best(self, work: Callable[[], object], least: int = 4, seconds: float = 0.03) -> float:
        """The shortest of ``least`` runs, and of as many more as fit into ``seconds``; the first only warms up."""
        times: list[float] = []
        while len(times) < least or (sum(times) < seconds and len(times) < 100):
            self.queue()
            begin = self.mark()
            work()
            end = self.mark()
            self.wait()
            times.append(self.between(begin, end))
        return min(times[1:])

    def calibrate(self) -> "Platform":
        """What this machine reaches: one large product, one long copy into new memory, one tiny product."""
        from manyheads.attention.mla import Platform

        size, length = (8192, 1 << 29) if self.device == "cuda" else (1024, 1 << 24)
        a = self.draw(size, size)
        source, tiny = self.like.new_ones(length), a[:8, :8].clone()
        peak = 2 * size**3 / self.best(lambda: a @ a, 20)
        copied = 2 * source.numel() * source.element_size()
        bandwidth = copied / self.best(source.clone, 20)
        return Platform(peak, bandwidth, self.best(lambda: tiny @ tiny, 50), fused_heads=self.device == "cuda")

    def draw(self, *shape: int) -> "torch.Tensor":
        """Normal values."""
        return self.like.new_empty(shape).normal_()

    def layer(self, batch: int, new: int, seen: int) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        """Projected queries, a cache and an up-projection, each such that what it makes has unit size."""
        d = self.dims
        q = self.draw(batch, d.num_heads, new, d.nope_dim + d.rope_dim)
        cache = self.draw(batch, 1, seen, d.rank + d.rope_dim)
        return q, cache, self.draw(d.num_heads, d.nope_dim + d.v_dim, d.rank) * d.rank**-0.5

    def ways(self, batch: int, new: int, seen: int) -> tuple[float, float]:
        """Seconds of ``expand`` and of ``absorb``."""
        from manyheads.attention import mla

        given, d = self.layer(batch, new, seen), self.projected
        factor = (d.nope_dim + d.rope_dim) ** -0.5
        expand = self.best(lambda: mla.expand(*given, d, scale=factor))
        return expand, self.best(lambda: mla.absorb(*given, d, scale=factor))

    def from_latents(self, batch: int, seen: int) -> "dict[Schedule, float]":
        """Seconds of every schedule that starts at the query latent, for one new token per row."""
        from manyheads.attention import mla

        d, (q, cache, up) = self.dims, self.layer(batch, 1, seen)
        c_q, uq = self.draw(batch, 1, d.q_rank), self.draw(d.num_heads, d.nope_dim, d.q_rank) * d.q_rank**-0.5
        rope, merged = q[..., d.nope_dim :], mla.merge(uq, up, d)
        names: tuple[Schedule, ...] = ("expand", "absorb", "reuse", "recompute")

        def run(way: "Schedule") -> float:
            return self.best(lambda: mla.mla(way, c_q, rope, cache, uq, up, d, scale=0.1, merged=merged))

        return {way: run(way) for way in names}


def decoder(size: Scale, bench: Bench) -> Any:
    """A DeepSeek-V3 of two dense layers with random weights; only its attention is of real size."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    heads, rank, nope, rope, v, q_rank = size.sizes
    config = DeepseekV3Config(
        vocab_size=1024, hidden_size=size.hidden, intermediate_size=min(size.hidden, 2048), num_hidden_layers=2,
        first_k_dense_replace=2, num_attention_heads=heads, num_key_value_heads=heads, kv_lora_rank=rank,
        q_lora_rank=q_rank, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=v, n_routed_experts=8,
        num_experts_per_tok=2, n_group=1, topk_group=1, max_position_embeddings=size.lengths[-1] + 256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    with torch.device(bench.device):
        model: Any = DeepseekV3ForCausalLM(config)
    return model.to(bench.like.dtype).eval().requires_grad_(False)


def filled(model: Any, tokens: "list[tuple[torch.Tensor, torch.Tensor]]", spec: str | None) -> Any:
    """A cache that holds these latents and rotary keys of each layer: transformers' own, or that of ``spec``."""
    from transformers import DynamicCache

    from manyheads.integrations.transformers import new_cache
    from manyheads.spec import parse

    cache: Any = DynamicCache(config=model.config) if spec is None else new_cache(model, parse(spec))
    for index, (latent, rope) in enumerate(tokens):
        cache.update(latent, rope, index)
    return cache


@contextmanager
def watched(model: Any, bench: Bench) -> Iterator[list[Any]]:
    """Marks before the up-projection and before the output projection of each layer: attention lies between."""
    marks: list[Any] = []
    modules = [m for block in model.model.layers for m in (block.self_attn.kv_b_proj, block.self_attn.o_proj)]
    hooks = [m.register_forward_pre_hook(lambda *_: marks.append(bench.mark())) for m in modules]
    try:
        yield marks
    finally:
        for hook in hooks:
            hook.remove()


def in_model(setting: Setting, size: Scale, bench: Bench) -> dict[str, list[float]]:
    """Decoding steps without and with the strategy, in turns: seconds of each step and of attention per layer."""
    import torch

    from manyheads.integrations import use

    batch, context = size.batches[-1], size.lengths[-1]
    model, (rank, rope) = decoder(size, bench), (bench.dims.rank, bench.dims.rope_dim)
    found: dict[str, list[float]] = {f"{what} {arm}": [] for what in ("step", "layer") for arm in ("stock", "mla_hw")}
    found["error"] = []
    for seed in setting.seeds:
        torch.manual_seed(seed)
        tokens = [(bench.draw(batch, 1, context, rank), bench.draw(batch, 1, context, rope)) for _ in range(2)]
        ids, logits = torch.randint(0, 1024, (batch, 1), device=bench.device), {}
        for arm, spec in (("stock", None), ("mla_hw", "mla_hw")):
            with torch.no_grad(), use(model) if spec else nullcontext():
                cache = filled(model, tokens, spec)
                logits[arm] = model(ids, past_key_values=cache).logits.float()  # warms up as well
                for _ in range(size.steps):
                    bench.wait()
                    begin = perf_counter()
                    model(ids, past_key_values=cache)
                    bench.wait()
                    found[f"step {arm}"].append(perf_counter() - begin)
                with watched(model, bench) as marks:
                    for _ in range(size.steps):
                        marks.clear()
                        bench.queue(8)
                        model(ids, past_key_values=cache)
                        bench.wait()
                        spent = [bench.between(a, b) for a, b in zip(marks[::2], marks[1::2], strict=True)]
                        found[f"layer {arm}"].append(fmean(spent))
            del cache
        difference = (logits["mla_hw"] - logits["stock"]).norm() / logits["stock"].norm()
        found["error"].append(float(difference))
    return found


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: measured seconds of expand and absorb, and which of them the model named."""

    shape: tuple[int, int, int]  # rows, queries per row, tokens held per row
    times: tuple[float, float]
    named: int

    @property
    def right(self) -> bool:
        return self.times[self.named] == min(self.times)

    def regret(self, chosen: int | None = None) -> float:
        """How much more than the better schedule the named one costs, or another one that is always ``chosen``."""
        return self.times[self.named if chosen is None else chosen] / min(self.times) - 1


def run(setting: Setting) -> Outcome:
    """Calibrate, measure the grid, the sweep and the model, and judge."""
    import torch

    from manyheads.attention import mla

    torch.manual_seed(setting.seeds[0])
    size = scale(setting)
    bench = Bench(setting.device, mla.Dims(*size.sizes))
    platform = bench.calibrate()
    figures = [
        Figure("calibrated peak", platform.peak_flops / 1e12, 1, unit="TFLOP/s"),
        Figure("calibrated bandwidth", platform.bandwidth / 1e9, 1, unit="GB/s"),
        Figure("calibrated launch", platform.overhead * 1e6, 1, unit="us"),
        Figure("ridge", platform.peak_flops / platform.bandwidth, 1, unit="FLOP/B"),
    ]
    cells, shapes = [], list(product(size.batches, size.queries, size.lengths))
    with torch.no_grad():
        for number, shape in enumerate(shapes):
            setting.progress(f"{shape[1]} queries, {shape[0]} x {shape[2]} tokens", 0.1 + 0.5 * number / len(shapes))
            named = mla.choose(bench.projected, *shape, platform, bench.like.element_size(), among=WAYS)
            cells.append(Cell(shape, bench.ways(*shape), WAYS.index(named)))
        figures += _decode_figures(cells, bench)
        figures += _dispatch_figures(cells)
        setting.progress("crossover", 0.6)
        figures += _sweep_figures(size, bench, platform)
    setting.progress("a whole model", 0.75)
    figures += _model_figures(in_model(setting, size, bench), size, bench, platform)
    return _judge({figure.name: figure for figure in figures}, cells, SAME[setting.device], tuple(figures))


def _decode_figures(cells: list[Cell], bench: Bench) -> list[Figure]:
    """One new token per row: measured times, their ratio, and the intensity that the roofline is about."""
    from manyheads.attention import mla

    figures, d, bits = [], bench.dims, bench.like.element_size()
    for cell in (cell for cell in cells if cell.shape[1] == 1):
        batch, _, seen = cell.shape
        where, (expand, absorb) = f"one token, {batch} x {seen}", cell.times
        figures.append(Figure(f"expand, {where}", 1e3 * expand, 1, unit="ms"))
        figures.append(Figure(f"absorb, {where}", 1e3 * absorb, 1, unit="ms"))
        figures.append(Figure(f"expand over absorb, {where}", expand / absorb, 1, unit="x"))
    for way, seconds in bench.from_latents(batch, seen).items():
        figures.append(Figure(f"{way} from query latents, one token, {batch} x {seen}", 1e3 * seconds, 1, unit="ms"))
    (heads,) = mla.heads_cost(batch, 1, seen, d.num_heads, d.num_heads, d.nope_dim + d.rope_dim, d.v_dim, bits)
    latent = next(s for s in mla.mla_cost("absorb", d, batch, 1, seen, bits, fused=True) if s.name == "attention")
    figures.append(Figure("intensity of attention with cached heads (model)", heads.intensity, 1, unit="FLOP/B"))
    figures.append(Figure("intensity of attention over latents (model)", latent.intensity, 1, unit="FLOP/B"))
    return figures


def _dispatch_figures(cells: list[Cell]) -> list[Figure]:
    """How often the model names the faster schedule, and what its choice costs beside two fixed choices."""
    figures = [Figure("share of cells named right", fmean(cell.right for cell in cells), len(cells))]
    for label, chosen in (("the model", None), ("always expand", 0), ("always absorb", 1)):
        regrets = [cell.regret(chosen) for cell in cells]
        figures.append(Figure(f"regret of {label}", fmean(regrets), len(cells)))
        figures.append(Figure(f"worst regret of {label}", max(regrets), len(cells)))
    return figures


def _sweep_figures(size: Scale, bench: Bench, platform: "Platform") -> list[Figure]:
    """Queries per row at which expanding becomes faster: by FLOPs alone, by the model, and measured."""
    from manyheads.attention import mla

    seen, d, bits = size.lengths[-1], bench.projected, bench.like.element_size()
    figures = [Figure("crossover by FLOPs", mla.crossover(d), 1, unit="queries")]
    told = [n for n in range(1, 4096) if mla.choose(d, 1, n, seen, platform, bits, among=WAYS) == "expand"]
    if told:
        figures.append(Figure(f"crossover by the model, 1 x {seen}", told[0], 1, unit="queries"))
    last = 1  # queries at which absorb was still faster
    for new in size.sweep:
        expand, absorb = bench.ways(1, new, seen)
        if expand < absorb:
            middle = (last + new) / 2
            figures.append(Figure(f"crossover measured, 1 x {seen}", middle, len(size.sweep), last, new, "queries"))
            break
        last = new
    return figures


def _model_figures(found: dict[str, list[float]], size: Scale, bench: Bench, platform: "Platform") -> list[Figure]:
    """A decoding step and its attention inside an unmodified model, beside the bare operator and the physical limit."""
    import numpy as np
    import torch

    from manyheads.attention import mla
    from manyheads.compare import stats

    figures, batch, seen, d = [], size.batches[-1], size.lengths[-1], bench.projected
    for what, label in (("step", "decoding step"), ("layer", "attention per layer in the model")):
        for arm in ("stock", "mla_hw"):
            ms = [1e3 * value for value in found[f"{what} {arm}"]]
            figures.append(Figure(f"{label}, {arm}", median(ms), len(ms), min(ms), max(ms), "ms"))
    ratios = np.array(found["step stock"]) / np.array(found["step mla_hw"])
    gain = stats.mean(ratios, np.arange(len(ratios), dtype=float), 0, "gain")
    figures.append(Figure("decoding step, stock over mla_hw", gain.value, gain.n, gain.low, gain.high, "x"))
    stock, inside = min(found["layer stock"]), min(found["layer mla_hw"])
    figures.append(Figure("attention, stock over mla_hw", stock / inside, gain.n, unit="x"))
    given = bench.layer(batch, 1, seen)
    with torch.no_grad():
        bare = bench.best(lambda: mla.absorb(*given, d, scale=0.1), 50)
    fused = mla.mla_cost("absorb", d, batch, 1, seen, bench.like.element_size(), fused=True)
    limit = mla.seconds(fused, replace(platform, overhead=0.0))
    figures.append(Figure("bare absorbed operator", 1e3 * bare, 50, unit="ms"))
    figures.append(
        Figure(f"attention in the model over the bare operator (goal {GOAL})", inside / bare, gain.n, unit="x")
    )
    figures.append(Figure("roofline of a fused kernel", 1e3 * limit, 1, unit="ms"))
    figures.append(Figure("relative error of logits against stock", max(found["error"]), len(found["error"])))
    return figures


def _judge(named: dict[str, Figure], cells: list[Cell], same: float, figures: tuple[Figure, ...]) -> Outcome:
    """Holds if decoding is far cheaper, the model chooses well, and a whole model gains from it."""
    largest = max((cell for cell in cells if cell.shape[1] == 1), key=lambda cell: (cell.shape[0], cell.shape[2]))
    cheaper = largest.times[0] / largest.times[1]
    right, regret = named["share of cells named right"].value, named["regret of the model"].value
    gain, error = named["decoding step, stock over mla_hw"], named["relative error of logits against stock"].value
    faster = gain.low is not None and gain.low > 1 and error <= same
    reason = (
        f"One token over {largest.shape[0]} x {largest.shape[2]} tokens costs {cheaper:.3g} times less absorbed than "
        f"expanded (asked: {CHEAPER:g}); the calibrated model names the faster schedule in {right:.0%} of {len(cells)} "
        f"cells (asked: {AGREE:.0%}), at {regret:.1%} more than the better one on average (at most {REGRET:.0%}); an "
        f"unmodified model decodes {gain.value:.3g} times as fast, logits within {error:.1g}."
    )
    holds = cheaper >= CHEAPER and right >= AGREE and regret <= REGRET and faster
    return Outcome("holds" if holds else "does not hold here", reason, figures)


claim = Claim(
    slug="mla_hw",
    statement=(
        "Decoding with latent attention is at least ten times cheaper absorbed than expanded, and which schedule is "
        "cheaper follows from the peak FLOP/s and the bandwidth of the machine."
    ),
    paper_figure=(
        "Simulated accelerators (Stream), DeepSeek-V3 sizes: MLA moves decoding towards the compute-bound regime, is "
        "steadier across platforms than MHA, and its schedule should follow the ratio of bandwidth to compute."
    ),
    run=run,
)
