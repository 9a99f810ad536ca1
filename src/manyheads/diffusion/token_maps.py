# SPDX-License-Identifier: Apache-2.0
"""Attention maps of a denoiser, of which only what was asked for is kept: where words act, and what is looked at.

While an image or video is made, for every site of attention and every branch of the batch a running mean over heads
and steps is kept of

- the columns of words: the share of each image token's attention that goes to a word of the prompt (``tokens``), in
  cross-attention and in joint attention;
- the attention that each image token receives from image tokens, where 1 is its share if all received alike
  (``received``);
- the rows of some image tokens: what they look at, in multiples of a uniform map (``queries``).

So N image tokens and C words cost ``N C`` numbers a site, never the ``N N`` or ``N S`` of the map, whose rows are made
a block at a time and dropped. Nothing of the model is changed: a watched run is bit-identical to an unwatched one.

Averaging columns of cross-attention over heads, layers and steps is that of What the DAAM: Interpreting Stable
Diffusion Using Cross Attention (arXiv 2210.04885), which sums them; here they are means, so that a value stays a share
of attention, cells of coarse maps are repeated rather than smoothed, and joint attention and videos are taken in.

    with manyheads.use(pipe, "token_maps:tokens=2+3") as port:
        image = pipe("a red cat beside a dog").images[0]
    found = maps(port, port.strategies[0], words=("red", "cat"))
    found.of("cat")  # [rows, frames, h, w]

Shapes: q, k ``[B, H, T, d]``; sums ``[rows, H or 1, C, frames, h, w]``, where frames that attend apart stand in rows of
the batch.

Choices. Places count from the first token of the text as the denoiser is given it: special tokens count, and where two
encoders' tokens stand one behind the other (SD3: CLIP, then T5) so do the first one's. Queries are image tokens of the
finest grid, frame by frame and row by row; on coarser grids the cell that holds them answers. Attention over time and
among text tokens has no image and is left out. A new run of the pipeline begins anew.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..call import AttentionCall, DiffusionStep, Layout, Site
from ..calls.edits import heads_at
from ..calls.statistics import Columns, ColumnSum, Statistic
from ..calls.weights import measure, weights
from ..errors import UserError
from ..strategy import AttentionWatch, Layers, Strategy
from ._maps import check_words, grid_of, merged, scaled, select_queries, to_grid

__all__ = ["TokenMaps", "WordMaps", "maps", "places"]

_SHARE, _TIMES = "share of attention", "times a uniform share"


@dataclass(slots=True)
class _Mean:
    """A running mean."""

    total: Tensor
    count: int = 1

    @property
    def value(self) -> Tensor:
        return self.total / self.count

    def plus(self, total: Tensor, count: int = 1) -> "_Mean":
        return _Mean(self.total + total, self.count + count)


@dataclass(frozen=True, kw_only=True)
class TokenMaps(AttentionWatch):
    """Keep maps of words, of attention received, and of what chosen image tokens look at.

    Attributes:
        tokens: words, as places in the prompt joined by ``+``; none for no maps of words.
        received: keep the attention that image tokens receive from image tokens.
        queries: image tokens whose rows are kept, as places joined by ``+``.
        steps: denoising steps to average over, as ``0-9+20``; all when not given.
        per_step: keep a map of each step beside the mean.
        per_head: keep every head apart.
        text: take only cross-attention over so many tokens, where a site has several contexts; 0 for whatever comes.
    """

    tokens: tuple[int, ...] = field(default=(), metadata={"help": "words, as places in the prompt joined by +"})
    received: bool = field(default=False, metadata={"help": "keep the attention that image tokens receive"})
    queries: tuple[int, ...] = field(default=(), metadata={"help": "image tokens whose rows are kept, joined by +"})
    steps: Layers = field(default=None, metadata={"help": "steps to average over, as 0-9+20; all when not given"})
    per_step: bool = field(default=False, metadata={"help": "keep a map of each step beside the mean"})
    per_head: bool = field(default=False, metadata={"help": "keep every head apart"})
    text: int = field(default=0, metadata={"help": "only cross-attention over so many tokens; 0 for whatever comes"})

    def selects(self, site: Site) -> bool:
        if not (self.tokens or self.received or self.queries):
            raise UserError("token_maps: nothing is asked for; give tokens=2+5 (places in the prompt) or received=true")
        words, image = bool(self.tokens), self.received or bool(self.queries)
        wanted = {"cross": words, "self": image, "joint": words or image}
        return super().selects(site) and wanted[site.kind]

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        step, kind, size = call.diffusion, call.site.kind, call.k.shape[2]
        if step is None or step.layout is None:
            raise UserError(f"token_maps: the token layout of {call.site.name} is not known, so its map has no image")
        if step.index is None and (self.per_step or self.steps is not None):
            raise UserError("token_maps has to know the step: open the pipeline, not its denoiser")
        if self.steps is not None and step.index not in self.steps:
            return
        if step.axis in ("time", "text") or (kind == "cross" and self.text not in (0, size)):
            return
        layout, length = step.layout, call.q.shape[2]
        image = layout.image(length) if kind == "joint" else slice(0, length)
        grid = grid_of(layout, image.stop - image.start, call.q.shape[0])
        if grid is None:
            return
        part = select_queries(call, image)
        found = self._found(part, layout, image, grid)
        self._keep(call, step, {what: to_grid(x, grid) for what, x in found.items()})

    def _found(
        self, part: AttentionCall, layout: Layout, image: slice, grid: tuple[int, int, int, int]
    ) -> dict[str, Tensor]:  # fmt: skip
        """What was asked for at the image's rows ``part``, ``[B, H, T, C]`` each."""
        kind, size, length = part.site.kind, part.k.shape[2], image.stop - image.start
        wanted: dict[str, Statistic] = {}
        if self.tokens and kind != "self":
            joint = kind == "joint"
            check_words(self.tokens, size - length if joint else size, self.slug)
            start = image.stop if joint and not layout.text_first else 0
            wanted["words"] = Columns(torch.tensor(self.tokens, device=part.k.device) + start)
        if self.received and kind != "cross":
            wanted["received"] = ColumnSum(torch.ones(1, length, 1, device=part.q.device))
        found: dict[str, Tensor] = dict(zip(wanted, measure(part, list(wanted.values())), strict=True))
        if "received" in found:
            found["received"] = found["received"][:, :, image]
        if self.queries and kind != "cross":
            found["queries"] = self._rows(part, layout, image, grid)
        return found

    def _rows(
        self, part: AttentionCall, layout: Layout, image: slice, grid: tuple[int, int, int, int]
    ) -> Tensor:  # fmt: skip
        """What ``queries`` look at, ``[B, H, T, C]``; 0 in the rows of frames that they are not in."""
        if min(self.queries) < 0 or max(self.queries) >= layout.tokens:
            raise UserError(f"token_maps: the image has tokens 0 to {layout.tokens - 1}, not {max(self.queries)}")
        apart, frames, high, wide = grid
        at = torch.tensor(self.queries, device=part.q.device)
        frame, row, column = at // (layout.height * layout.width), at // layout.width % layout.height, at % layout.width
        cell = row * high // layout.height * wide + column * wide // layout.width
        asked = select_queries(part, cell if apart > 1 else frame * high * wide + cell)
        rows = torch.cat([x for _, x in weights(asked)], 2)[..., image].transpose(2, 3) * (frames * high * wide)
        if apart == 1:
            return rows
        there = torch.arange(rows.shape[0], device=at.device)[:, None] % apart == frame
        return rows * there[:, None, None]

    def _keep(self, call: AttentionCall, step: DiffusionStep, found: dict[str, Tensor]) -> None:
        state, shape = call.state, (call.q.shape[0], call.q.shape[2], call.k.shape[2])
        if state.get("run") != step.run:
            state.clear()
            state.update(run=step.run, branches=step.branches, shape=shape, means={})
        if state["shape"] != shape:
            raise UserError(
                f"token_maps: {call.site.name} came with rows, queries and keys {state['shape']}, then {shape}; of "
                "several contexts name one by text=, and open anew for another size"
            )
        for what, x in found.items():
            x = x if self.per_head else x.mean(1, keepdim=True)
            for index in (None, step.index) if self.per_step else (None,):
                before = state["means"].get((what, index))
                state["means"][what, index] = _Mean(x) if before is None else before.plus(x)


class _Port(Protocol):
    def kept(self, strategy: Strategy) -> list[tuple[Site, dict[str, Any]]]: ...


@dataclass(frozen=True)
class WordMaps:
    """Maps over what was generated, means over heads and sites, float32 on the CPU.

    Attributes:
        names: of the C maps: words, then ``received``, then ``from 12`` for what image token 12 looks at.
        units: of each: a word's values are shares of attention, 0 to 1; the others are multiples of a uniform map.
        maps: by branch, ``[rows, C, frames, h, w]``, means over steps too. NaN where nothing was seen.
        layers: the same by branch and layer, a mean over the layer's sites.
        steps: the same by branch and step, where steps were kept apart.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    maps: dict[str, Tensor]
    layers: dict[str, dict[int, Tensor]]
    steps: dict[str, dict[int, Tensor]]

    def of(
        self, name: str, branch: str | None = None, *, layer: int | None = None, step: int | None = None
    ) -> Tensor:  # fmt: skip
        """The map ``[rows, frames, h, w]`` of one name: of all layers and steps, of one layer, or of one step.

        Args:
            name: one of ``names``.
            branch: ``cond`` where there is one and none is named, else the first.

        Raises:
            UserError: there is no such map.
        """
        branch = branch or ("cond" if "cond" in self.maps else next(iter(self.maps)))
        for value, known in ((name, self.names), (branch, self.maps)):
            if value not in known:
                raise UserError(f"there is no map of {value!r}, only of {', '.join(known)}")
        if layer is not None and step is not None:
            raise UserError("maps are kept by layer or by step, not by both")
        place, kept = (layer, self.layers) if layer is not None else (step, self.steps)
        if place is None:
            return self.maps[branch][:, self.names.index(name)]
        if place not in kept.get(branch, {}):
            raise UserError(f"no map of {branch!r} is kept at {place}, only at {sorted(kept.get(branch, {}))}")
        return kept[branch][place][:, self.names.index(name)]

    def mask(self, names: Sequence[str], threshold: float = 0.5, branch: str | None = None) -> Tensor:
        """Where the sum of some maps, scaled to [0, 1] for each row, is above a threshold: ``[rows, frames, h, w]``."""
        return scaled(torch.stack([self.of(name, branch) for name in names]).sum(0)) > threshold


def places(tokenizer: Any, prompt: str, word: str) -> tuple[int, ...]:
    """Positions of the tokens of a word in a prompt, special tokens counted: of each occurrence, in either case.

    Args:
        tokenizer: a fast tokenizer of transformers.
        prompt: as the tokenizer is given it.
        word: one word, or several that follow each other.

    Raises:
        UserError: the prompt does not have the word, or the tokenizer does not give its tokens' positions.
    """
    spans = [found.span() for found in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE)]
    if not spans:
        raise UserError(f"{word!r} is not in the prompt {prompt!r}")
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"{type(tokenizer).__name__} does not say where its tokens stand; give places instead of words")
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    return tuple(i for i, (a, b) in enumerate(offsets) if any(max(a, c) < min(b, d) for c, d in spans))


def maps(
    port: _Port, strategy: TokenMaps, *, words: Mapping[str, Sequence[int]] | Sequence[str] = (),
    heads: Sequence[str] = (), size: int | None = None,
) -> WordMaps:  # fmt: skip
    """What ``strategy`` kept in the latest run, as means over heads and sites at the largest grid among them.

    Args:
        port: that the strategy was used by, open or closed.
        strategy: as the port has it: ``port.strategies[i]``.
        words: names of the ``tokens``, in their order; or words with the places of their tokens (see :func:`places`),
            whose shares are added up. ``token 5`` and so on when not given.
        heads: as ``layer.head``, only these count; needs ``per_head``. All when not given.
        size: leave out sites whose grid has a longer side.

    Raises:
        UserError: nothing was kept, or names and heads do not fit.
    """
    named = _named(strategy.tokens, words)
    if heads and not strategy.per_head:
        raise UserError("token_maps kept the mean over heads only; heads are chosen among those kept by per_head=true")
    kept = [(site, state) for site, branches in port.kept(strategy) for state in branches.values() if state]
    run = max((state["run"] for _, state in kept), default=0)
    found: dict[tuple[str, str, int | None], dict[Site, _Mean]] = {}
    for site, state in kept:
        chosen = heads_at(heads, site)
        if state["run"] != run or (heads and not chosen):
            continue
        for (what, step), mean in state["means"].items():
            total, groups = _of_heads(mean.total, chosen, site), len(state["branches"])
            if what == "words":
                total = torch.stack([total[:, columns].sum(1) for _, columns in named], 1)
            if size is not None and max(total.shape[-2:]) > size:
                continue
            for branch, rows in zip(state["branches"], total.float().cpu().chunk(groups), strict=True):
                of_site = found.setdefault((branch, what, step), {})
                of_site[site] = of_site[site].plus(rows, mean.count) if site in of_site else _Mean(rows, mean.count)
    if not found:
        raise UserError(f"{strategy.spec} kept nothing: no site showed an image that it was asked for")
    return _to_word_maps(found, strategy, [name for name, _ in named])


def _named(
    tokens: Sequence[int], words: Mapping[str, Sequence[int]] | Sequence[str]
) -> list[tuple[str, list[int]]]:  # fmt: skip
    """Names, and which of the ``tokens`` each is made of."""
    if isinstance(words, Mapping):
        lacking = sorted({place for known in words.values() for place in known} - set(tokens))
        if lacking or not all(words.values()):
            raise UserError(
                f"token_maps kept tokens {'+'.join(map(str, tokens))}, not {lacking} that words are made of"
            )
        return [(word, [tokens.index(place) for place in known]) for word, known in words.items()]
    if words and len(words) != len(tokens):
        raise UserError(f"{len(words)} names for {len(tokens)} tokens; give one for each")
    return [(name, [i]) for i, name in enumerate(words or [f"token {t}" for t in tokens])]


def _of_heads(total: Tensor, chosen: list[int], site: Site) -> Tensor:
    """``[rows, H, C, frames, h, w]`` as its mean over all heads or the chosen."""
    if chosen and max(chosen) >= total.shape[1]:
        raise UserError(f"{site.name} has heads 0 to {total.shape[1] - 1}, not {max(chosen)}")
    return (total[:, chosen] if chosen else total).mean(1)


def _to_word_maps(
    found: dict[tuple[str, str, int | None], dict[Site, _Mean]], strategy: TokenMaps, words: Sequence[str]
) -> WordMaps:  # fmt: skip
    names = {
        "words": tuple(words),
        "received": ("received",) if strategy.received else (),
        "queries": tuple(f"from {q}" for q in strategy.queries),
    }
    shapes = [m.total.shape for sites in found.values() for m in sites.values()]
    large = max((shape[-2:] for shape in shapes), key=lambda s: s[0] * s[1])

    def averaged(branch: str, step: int | None, layer: int | None = None) -> Tensor | None:
        made: list[Tensor] = []
        rows = next(m.total.shape for (b, _, _), sites in found.items() if b == branch for m in sites.values())
        seen = False
        for what, each in names.items():
            sites = found.get((branch, what, step), {})
            means = [mean.value for site, mean in sites.items() if layer is None or site.layer == layer]
            seen = seen or bool(means)
            nothing = torch.full((rows[0], len(each), rows[2], *large), torch.nan)
            made.append(merged(means, large) if means else nothing)
        return torch.cat(made, 1) if seen else None

    branches = tuple(dict.fromkeys(branch for branch, _, _ in found))
    numbers = sorted({site.layer for sites in found.values() for site in sites if site.layer is not None})
    steps = sorted({step for _, _, step in found if step is not None})
    whole = {b: x for b in branches if (x := averaged(b, None)) is not None}
    units = [_SHARE if what == "words" else _TIMES for what, each in names.items() for _ in each]
    return WordMaps(
        sum(names.values(), ()), tuple(units), whole,
        {b: {n: x for n in numbers if (x := averaged(b, None, n)) is not None} for b in branches},
        {b: {n: x for n in steps if (x := averaged(b, n)) is not None} for b in branches} if strategy.per_step else {},
    )  # fmt: skip
