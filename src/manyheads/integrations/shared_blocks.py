# SPDX-License-Identifier: Apache-2.0
"""A cache of blocks that several rows read in orders of their own, each block held once.

A :class:`Block` holds keys turned to positions that count from its own first token. A row sees a list of blocks as one
sequence, in which block b begins behind ``o_b`` tokens, and writes to the last one. Its query, turned to the place p in
its own block, stands at ``o_own + p``; so what it needs against the keys of b is the same query turned on by
``o_own - o_b``, whatever p is. Keys are never touched: queries are turned once for each block, all rows are one product
with its keys, which are read once for all of them, and one softmax goes over what the blocks give.
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
from ..attention.reference import block_size, softmax, widened
from ..attention.rope import Rotary, rotate
from ..attention.shared_block import Block
from ..call import AttentionCall, Site
from ..errors import UserError
from ..lens import device_of
from ..strategy import Attention, AttentionCompute
from .cache import SlotCache, StoreLayer, cache_arguments
from .forwards import owner_of
from .linear import find_linear
from .site_search import find_sites
from .sites import SiteState
from .transformers import Port

__all__ = ["SharedBlocks"]

_CHUNK = 512  # tokens of a long text that are read at once at most
_SAME = {4: 5e-3, 2: 0.1, 8: 5e-3}  # of the spread of the logits, by bytes of a number: of one path against another
_FIXED_ANGLES = frozenset({"default", "linear", "llama3", "yarn", "proportional"})  # by position alone


View = Sequence[Block]


@dataclass
class _Forward:
    """What the layers of a forward need to know.

    Attributes:
        seen: the blocks that any row sees.
        ahead: for each of them and each row, positions from the row's place to where the block sees it stand.
        upto: likewise how many of its keys the row sees; those that it writes, causally.
        writer: for each of them the row that writes to it, None for none.
        writes: block, place of the first token and how many, of each row.
        places: ``[W, T]`` of the queries in their own blocks.
    """

    seen: list[Block]
    ahead: list[list[int]]
    upto: list[list[int]]
    writer: list[int | None]
    writes: list[tuple[Block, int, int]]
    places: Tensor
    turns: dict[str, Rotary] = field(default_factory=dict)
    masks: dict[tuple[int | None, ...], Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, firsts: Sequence[int]) -> Tensor | None:
        """Which keys of all blocks each row's queries see, bool ``[W, T, N]``; None for all of them.

        Positions are those of the row's own view, so that a window reaches as far back as it would in one sequence.
        """
        key = (window, *firsts)
        if key not in self.masks:
            masks = [self._mask(n, window, first) for n, first in enumerate(firsts)]
            whole = torch.cat(masks, -1)
            self.masks[key] = None if bool(whole.all()) else whole
        return self.masks[key]

    def _mask(self, number: int, window: int | None, first: int) -> Tensor:
        device = self.places.device
        keys = torch.arange(first, self.seen[number].length, device=device)
        upto, ahead = (torch.tensor(x[number], device=device)[:, None] for x in (self.upto, self.ahead))
        upto = upto.expand_as(self.places)
        if (writer := self.writer[number]) is not None:
            upto = upto.clone()
            upto[writer] = self.places[writer] + 1
        mask = keys < upto[..., None]
        return mask if window is None else mask & (keys > (self.places + ahead)[..., None] - window)


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
        placed = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
        if len(placed) > 1:
            raise UserError(f"{type(model).__name__} is on several devices, and blocks are on one: load it on one")
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
        keys, heads = sum(block.length for block in view) + len(tokens), self._site.num_heads or 1
        size = min(_CHUNK, block_size(torch.empty(0, device=self._device), keys * heads))
        for start in range(0, len(tokens), size):
            logits = self.read([(view, tokens[start : start + size])])
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
        seen = list({id(block): block for view, _ in rows for block in view if block.length}.values())
        number = {id(block): n for n, block in enumerate(seen)}
        ahead, upto = ([[0] * len(rows) for _ in seen] for _ in range(2))
        writer: list[int | None] = [None] * len(seen)
        for row, (view, _) in enumerate(rows):
            far, writer[number[id(view[-1])]] = 0, row
            for block in reversed(view):
                own = block is view[-1]
                length = block.length if same_step or own else before[id(block)]
                far += 0 if own else length
                if block.length:
                    ahead[number[id(block)]][row], upto[number[id(block)]][row] = far, length
        ids = [[0] * (width - len(tokens)) + list(tokens) for _, tokens in rows]
        at = torch.tensor(places, device=self._device)
        self._now = _Forward(seen, ahead, upto, writer, writes, at)
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
        return device_of(self.model)

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
            cos, _ = self._turn([0], kind, q)
            self._halved |= call.rotary is not None and call.rotary[0].shape[-1] == 2 * cos.shape[-1]
            now.turns[kind] = self._turn([far for each in now.ahead for far in each], kind, q)
        held = [block.held(layer) for block in now.seen]
        mask = now.mask(call.site.window, [first for _, _, first in held])
        turned = rotate(q.repeat(len(held), 1, 1, 1), now.turns[kind])  # [n * W, H, T, d]
        return _attention(turned, held, call, mask)


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
        super().__init__()  # type: ignore[no-untyped-call]
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


def _attention(
    q: Tensor, held: Sequence[tuple[Tensor, Tensor, int]], call: AttentionCall, mask: Tensor | None
) -> Tensor:
    """``[W, T, H, dv]`` of queries ``[n * W, H, T, d]`` turned for each of n blocks, over the keys of all of them."""
    rows, heads, count, dim = call.q.shape
    kv = held[0][0].shape[1]
    flat = q.view(len(held), rows, kv, heads // kv * count, dim).transpose(1, 2)
    flat = flat.reshape(len(held), kv, -1, dim).to(call.k.dtype)
    x = torch.cat([_product(part, k[0].mT) for part, (k, _, _) in zip(flat, held, strict=True)], -1) * call.scale
    if call.softcap is not None:
        x = torch.tanh(x / call.softcap) * call.softcap
    x = x.view(kv, rows, heads // kv, count, -1).transpose(0, 1).reshape(rows, heads, count, -1)
    weights = softmax(x, None if mask is None else mask[:, None], call.sinks).to(call.v.dtype)
    weights = weights.view(rows, kv, -1, x.shape[-1]).transpose(0, 1).reshape(kv, -1, x.shape[-1])
    parts = zip(weights.split([k.shape[2] for k, _, _ in held], -1), held, strict=True)
    out = torch.stack([_product(part, v[0]) for part, (_, v, _) in parts]).sum(0)
    return out.view(kv, rows, heads // kv, count, -1).permute(1, 3, 0, 2, 4).flatten(2, 3).to(call.q.dtype)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of batches of matrices, summed and given in float32 at least."""
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.bmm(a, b, out_dtype=torch.float32)
    return widened(a) @ widened(b)
