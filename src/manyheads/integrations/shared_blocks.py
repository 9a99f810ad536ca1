# SPDX-License-Identifier: Apache-2.0
"""A cache of blocks that several rows read in orders of their own, each block held once.

A :class:`Block` holds keys turned to positions that count from its own first token. A row sees a list of blocks as one
sequence, in which block b begins behind ``o_b`` tokens, and writes to the last one. Its query, turned to the place p in
its own block, stands at ``o_own + p``; so what it needs against the keys of b is the same query turned on by
``o_own - o_b``, whatever p is. Keys are never touched: one turn of the queries for each block, softmax over the block,
and parts merge by their log-sum-exp. All rows that see a block are one product with its keys.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention.padded import nbytes
from ..attention.reference import widened
from ..attention.rope import Rotary, rotate
from ..attention.sparse import merge
from ..call import AttentionCall, Site
from ..errors import UserError
from ..strategy import Attention, AttentionCompute
from .cache import SlotCache, StoreLayer, cache_arguments
from .forwards import owner_of
from .linear import find_linear
from .sites import SiteState, find_sites
from .transformers import Port

__all__ = ["Block", "SharedBlocks"]

_ROOM = 16  # a block grows to twice its tokens, in whole pieces of so many
_CHUNK = 512  # tokens of a long text that are read at once
_SAME = {4: 5e-3, 2: 0.1, 8: 5e-3}  # of the spread of the logits, by bytes of a number: of one path against another
_FIXED_ANGLES = frozenset({"default", "linear", "llama3", "yarn", "proportional"})  # by position alone


class Block:
    """Keys and values of tokens that follow each other, in every layer.

    Attributes:
        length: tokens, those that the forward at hand writes included.
        first: by layer, the place of the first key that is held; 0 where none was dropped.
    """

    def __init__(self) -> None:
        self.length = 0
        self.first: dict[int, int] = {}
        self._held: dict[int, tuple[Tensor, Tensor]] = {}

    def held(self, layer: int) -> tuple[Tensor, Tensor, int]:
        """Keys and values ``[1, Hkv, n, d]`` up to ``length``, and the place of the first."""
        first = self.first.get(layer, 0)
        keys, values = (x[:, :, : self.length - first] for x in self._held[layer])
        return keys, values, first

    def write(self, layer: int, k: Tensor, v: Tensor, place: int) -> None:
        """Put ``k, v [1, Hkv, n, d]`` at ``place`` and what follows; the storage doubles when it is full."""
        at = place - self.first.get(layer, 0)
        stop = at + k.shape[2]
        held = self._held.get(layer)
        if held is None or held[0].shape[2] < stop:
            room = -(-max(stop, 2 * at) // _ROOM) * _ROOM
            new = tuple(x.new_empty(1, x.shape[1], room, x.shape[3]) for x in (k, v))
            if held is not None:
                for x, old in zip(new, held, strict=True):
                    x[:, :, :at] = old[:, :, :at]
            held = self._held[layer] = (new[0], new[1])
        for x, given in zip(held, (k, v), strict=True):
            x[:, :, at:stop] = given

    def hold(self, layer: int, k: Tensor, v: Tensor, first: int) -> None:
        """Hold tensors of another cache as they are, without a copy."""
        self._held[layer], self.first[layer] = (k, v), first

    def clear(self) -> None:
        """Forget the tokens and keep the room."""
        self.length = 0

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [x for pair in self._held.values() for x in pair]


View = Sequence[Block]


@dataclass
class _Seen:
    """A block as the rows of a forward see it: which rows, how far on each of them stands, how many keys it sees."""

    block: Block
    rows: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)
    upto: list[int] = field(default_factory=list)
    writer: int | None = None  # among ``rows``


@dataclass
class _Forward:
    """What the layers of a forward need: what is seen, and which places of which blocks its tokens are written to."""

    seen: list[_Seen]
    writes: list[tuple[Block, int, int]]  # block, place of the first token, how many; of each row
    places: Tensor  # [W, T] of the queries in their own blocks
    furthest: int  # of them
    turns: dict[str, list[Rotary]] = field(default_factory=dict)


class SharedBlocks:
    """A decoder with rotary positions, reading and writing blocks while this is open (``with``).

    Args:
        model: of transformers, under :func:`manyheads.use` or not.

    Attributes:
        forwards: of the model so far.

    Raises:
        UserError: its attention cannot be put together from blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.forwards, self.fed = model, 0, 0
        self._now: _Forward | None = None
        self._types: dict[int, str] = {}
        self._halved = False
        sites = find_sites(model)
        for site, module in sites:
            self._refuse(site, module)
        if not sites or find_linear(model, len(sites)):
            raise UserError(f"{type(model).__name__} has layers without softmax attention, which have no keys to share")
        self._site = sites[0][0]
        self._port = Port(model, (_SharedAttention(blocks=self),))
        self._cache = Cache(layers=[_Writer(self, site) for site, _ in sites])

    def _refuse(self, site: Site, module: nn.Module) -> None:
        name, config = type(self.model).__name__, cast(Any, getattr(module, "config", None))
        if site.kind != "self" or not site.causal or site.latent is not None or site.kv_sharing or site.layer is None:
            raise UserError(f"{site.name} of {name} keeps no keys of its own for each token, which blocks are made of")
        if getattr(config, "attention_chunk_size", None):
            raise UserError(f"{name} attends within chunks that count from the start of a text, which blocks have not")
        if claims := SiteState.claims(module, Attention):
            raise UserError(f"{claims[0].spec} acts on attention that is put together from blocks: leave it away")
        rotary: Any = getattr(owner_of(self.model, site), "rotary_emb", None)
        if rotary is None:
            raise UserError(f"{name} has no rotary positions, the only ones that can be turned: use Llama, Qwen, Gemma")
        kinds = getattr(rotary, "rope_type", "default")
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind not in _FIXED_ANGLES:
                raise UserError(f"{name} scales its rotary positions by the length of the text ({kind}): blocks cannot")
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            self._types[site.layer] = config.layer_types[site.layer]

    def __enter__(self) -> Self:
        self._port.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._port.__exit__(kind, error, trace)

    def of(self, cache: Any, count: int) -> Block | None:
        """The first ``count`` tokens that ``cache`` has read, sharing its tensors; None where it holds fewer.

        A layer with a window may have dropped tokens before them that no later query sees.

        Raises:
            UserError: the cache is not the whole one.
        """
        if not isinstance(cache, SlotCache) or any(type(layer) is not StoreLayer for layer in cache.layers):
            raise UserError("blocks begin with the cache of the prompt, and there is none that could be shared")
        block = Block()
        block.length = count
        for layer in cast("list[StoreLayer]", cache.layers):
            if layer.strategy.slug != "full":
                raise UserError(f"{layer.strategy.spec} drops or packs keys that all are to share: leave it away")
            k, v, seen = layer.store.keys, layer.store.values, int(layer.store.seen)
            if k is None or v is None or count > seen or (k.shape[2] < seen and count < seen):
                return None
            assert layer.site.layer is not None
            cut = seen - count
            block.hold(layer.site.layer, k[:, :, : k.shape[2] - cut], v[:, :, : v.shape[2] - cut], seen - k.shape[2])
        return block

    def check(self, ids: Sequence[int]) -> None:
        """Read a few tokens in three blocks and at once: the model must predict the same, or it is refused."""
        some = (list(ids) * 6)[:6]
        given = torch.tensor([some], device=self._device)
        with torch.inference_mode():
            want = self.model(input_ids=given, use_cache=False).logits[0, -1].float()
            blocks = [Block(), Block(), Block()]
            for upto, (start, stop) in ((1, (0, 2)), (2, (2, 4)), (3, (4, 5)), (3, (5, 6))):
                found = self.read([(blocks[:upto], some[start:stop])])[0].float()
        self.forwards = 0
        limit = _SAME[next(self.model.parameters()).element_size()]
        if not (found - want).norm() <= limit * want.std() * want.numel() ** 0.5:
            raise UserError(
                f"{type(self.model).__name__} predicts otherwise when its cache is put together from blocks: its "
                "positions are no plain rotary ones in all layers"
            )

    def read_long(self, view: View, tokens: Sequence[int]) -> Tensor:
        """:meth:`read` of one row, in pieces."""
        for start in range(0, len(tokens), _CHUNK):
            logits = self.read([(view, tokens[start : start + _CHUNK])])
        return logits[0]

    def read(self, rows: Sequence[tuple[View, Sequence[int]]], *, same_step: bool = True) -> Tensor:
        """Read tokens in every row, at least one, and write them to the last block of what it sees.

        All is written before any row attends, layer by layer. No two rows write to one block.

        Args:
            rows: what each sees, in order, and its tokens.
            same_step: a row sees what the others write in this forward; else what they wrote before.

        Returns:
            Logits ``[W, V]`` of the token after each row's last.
        """
        width = max(len(tokens) for _, tokens in rows)
        before = {id(block): block.length for view, _ in rows for block in view}
        writes = [(view[-1], view[-1].length, len(tokens)) for view, tokens in rows]
        for block, _, count in writes:
            block.length += count
        places = [[max(0, start + i - width + n) for i in range(width)] for _, start, n in writes]
        found: dict[int, _Seen] = {}
        for row, (view, _) in enumerate(rows):
            ahead = sum(block.length for block in view[:-1])
            if not same_step:
                ahead = sum(before[id(block)] for block in view[:-1])
            for block in view:
                length = block.length if same_step or block is view[-1] else before[id(block)]
                if length:
                    seen = found.setdefault(id(block), _Seen(block))
                    seen.writer = len(seen.rows) if block is view[-1] else seen.writer
                    seen.rows.append(row)
                    seen.ahead.append(ahead)
                    seen.upto.append(length)
                ahead -= length if block is not view[-1] else 0
        ids = [[0] * (width - len(tokens)) + list(tokens) for _, tokens in rows]
        at = torch.tensor(places, device=self._device)
        self._now = _Forward(list(found.values()), writes, at, max(map(max, places)))
        self.fed, given = width, cache_arguments(self.model, self._cache)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            given["logits_to_keep"] = 1
        try:
            out = self.model(input_ids=torch.tensor(ids, device=self._device), position_ids=at, **given)
        finally:
            self._now = None
        self.forwards += 1
        return cast(Tensor, out.logits[:, -1])

    def move(self, source: Block, target: Block) -> None:
        """Put the tokens of ``source`` behind those of ``target``: their keys are turned on, nothing is computed."""
        for layer in range(len(self._cache.layers)):
            k, v, _ = source.held(layer)
            turn = self._turn([target.length], self._types.get(layer, ""), k)
            target.write(layer, rotate(widened(k), turn).to(k.dtype), v, target.length)
        target.length += source.length
        source.clear()

    def nbytes(self, *blocks: Block) -> int:
        """Bytes of what blocks hold, each storage once, room for growth included."""
        return nbytes(*(x for block in blocks for x in block.tensors))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _turn(self, places: Sequence[int], kind: str, like: Tensor) -> Rotary:
        """Cosines and sines ``[n, 1, r]`` of turns by so many positions, without the model's scaling of rotations."""
        rotary: Any = owner_of(self.model, self._site).rotary_emb
        x = torch.empty(0, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        more = (kind,) if kind else ()
        cos, sin = (t[0][:, None] for t in rotary(x, torch.tensor([list(places)], device=like.device), *more))
        if self._halved:  # the model's tables have each angle once, and stand twice side by side
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        size = torch.hypot(cos, sin)
        return cos / size, sin / size

    def _take(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the keys and values of the forward at hand to the blocks of their rows, without the padding."""
        assert self._now is not None
        for row, (block, place, count) in enumerate(self._now.writes):
            block.write(layer, k[row : row + 1, :, -count:], v[row : row + 1, :, -count:], place)

    def _attend(self, call: AttentionCall) -> Tensor | None:
        """``[W, T, H, dv]`` from all blocks; None outside :meth:`read`."""
        now, layer = self._now, call.site.layer
        if now is None or layer is None:
            return None
        kind, q = self._types.get(layer, ""), widened(call.q)
        if kind not in now.turns:
            cos, sin = self._turn([0], kind, q)
            self._halved |= call.rotary is not None and call.rotary[0].shape[-1] == 2 * cos.shape[-1]
            cos, sin = self._turn([n for seen in now.seen for n in seen.ahead], kind, q)
            sizes = [len(seen.rows) for seen in now.seen]
            now.turns[kind] = list(zip(cos.split(sizes), sin.split(sizes), strict=True))
        outputs, lses = [], []
        for seen, turn in zip(now.seen, now.turns[kind], strict=True):
            k, v, first = seen.block.held(layer)
            out, lse = _part(rotate(q[seen.rows], turn), k, v, call, _mask(seen, now, call.site.window, first))
            if len(seen.rows) < len(q):
                whole = out.new_zeros(len(q), *out.shape[1:]), lse.new_full((len(q), *lse.shape[1:]), -torch.inf)
                whole[0][seen.rows], whole[1][seen.rows] = out, lse
                out, lse = whole
            outputs.append(out)
            lses.append(lse)
        if call.sinks is not None:
            outputs.append(torch.zeros_like(outputs[0]))
            lses.append(call.sinks.to(lses[0].dtype)[None, :, None].expand_as(lses[0]))
        return merge(outputs, lses)[0].to(call.q.dtype).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class _SharedAttention(AttentionCompute):
    """Attention over blocks, while they are open."""

    blocks: Any = field(default=None, compare=False)

    def attend(self, call: AttentionCall) -> Tensor | None:
        return cast(SharedBlocks, self.blocks)._attend(call)


class _Writer(CacheLayerMixin):
    """A layer of the cache that the model is given: it writes to blocks, and attention reads them itself."""

    is_sliding = False

    def __init__(self, blocks: SharedBlocks, site: Site) -> None:
        super().__init__()
        self.blocks, self.layer = blocks, cast(int, site.layer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: blocks take shape with their first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.blocks._take(self.layer, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.blocks.fed

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


def _mask(seen: _Seen, now: _Forward, window: int | None, first: int) -> Tensor | None:
    """Which keys of a block each row's queries see, bool ``[R, T, n]``; None for all.

    Positions are those of the row's own view, so that a window reaches as far back as it would in one sequence.
    """
    places, length = now.places[seen.rows], seen.block.length
    cut = window is not None and max(seen.ahead) + now.furthest - first >= window
    if places.shape[1] == 1 and min(seen.upto) == length and not cut:
        return None
    keys = torch.arange(first, length, device=places.device)
    upto = torch.tensor(seen.upto, device=places.device)[:, None].expand_as(places).clone()
    if seen.writer is not None:
        upto[seen.writer] = places[seen.writer] + 1
    mask = keys < upto[..., None]
    if window is not None:
        at = places + torch.tensor(seen.ahead, device=places.device)[:, None]
        mask = mask & (keys > at[..., None] - window)
    return mask


def _part(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of ``q [R, H, T, d]`` over one block ``[1, Hkv, n, d]``: output, and log-sum-exp ``[R, H, T]``."""
    rows, heads, count, dim = q.shape
    groups = heads // k.shape[1]
    flat = q.reshape(rows, k.shape[1], groups * count, dim).transpose(0, 1).reshape(k.shape[1], -1, dim)
    x = _product(flat.to(k.dtype), k[0].mT) * call.scale
    if call.softcap is not None:
        x = torch.tanh(x / call.softcap) * call.softcap
    x = x.view(k.shape[1], rows, groups, count, -1)
    if mask is not None:
        x = x.masked_fill(~mask[:, None], -torch.inf)
    lse = x.logsumexp(-1)
    weights = (x - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = _product(weights.view(k.shape[1], -1, x.shape[-1]).to(v.dtype), v[0])
    out = out.view(k.shape[1], rows, groups, count, -1).transpose(0, 1).reshape(rows, heads, count, -1)
    return out, lse.transpose(0, 1).reshape(rows, heads, count)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of batches of matrices, summed and given in float32 at least."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return widened(a) @ widened(b)
