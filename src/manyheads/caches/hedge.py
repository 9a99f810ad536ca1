# SPDX-License-Identifier: Apache-2.0
"""Keep what the text is about to use, and what any question could ask for, in few bits, wherever in the model it is.

Ours, not a paper's. A cache is compressed before it is known what comes next, and the strategies it combines each bet
on one future. Scores from the prompt's own queries (SnapKV, arXiv 2404.14469) expect the text to go on as it went, and
lose what only a later question will need. Key diversity (KeyDiff, arXiv 2504.15364) keeps unusual keys, whatever may
be asked, and loses what ordinary text lives on. This one hedges, in four parts:

- **Distinctness** for the unknown question: -cos(key, mean of unit keys) as in KeyDiff, but with the rotation of the
  position undone. Rotated keys differ because they stand apart; these differ only by what they say.
- **Foresight** for the text that goes on: the last ``window_size`` queries are turned on to the next position, as if
  asked again there, and attend to all keys at once beside the tokens near their own place, which new text will have of
  its own. Where p_tj are the weights, a token counts by the root mean square of what it adds to the output,
  sqrt(mean_t p_tj^2) * |v_j|: the square root of the squared error that dropping it alone would bring. (Expected
  attention, arXiv 2510.00636, turns a Gaussian of the queries on and takes the mean.)
- **One ranking over the model.** All tokens of all heads and layers are ranked by either score, and a token is placed
  where the better of its places, p_distinct / ``distinct`` and p_foresight / (1 - ``distinct``), puts it; the best
  stay. Both scores mean the same in every head, so a head whose keys are all alike, or that looks at its neighbours
  only, leaves its bytes to the few that look things up (Ada-KV, arXiv 2407.11550, does so among the heads of a layer).
- **Few bits.** What stays is stored as FP8, as INT4, or with keys in FP8 and values in INT4 (``k8v4``), keys scaled by
  rotary pair (FireQ, arXiv 2505.20839, "pre"), but for the ``recent`` last tokens: about 1.9, 3.5 or 2.5 tokens in the
  bytes of one. ``bits=auto`` follows what ``benchmarks/hedge_bits.json`` measured. SmolLM2-135M (90 key/value heads),
  loss at 1,024 tokens: at a half and a quarter of the bytes INT4 loses more than either other format, at a half FP8
  the least; at a quarter FP8 and ``k8v4`` are not told apart, at a tenth none of the three is, and needles tell none
  apart anywhere. So FP8, and below a fifth INT4, which also holds most tokens. gemma-3-270m (18 key/value heads in
  all, 3 of them in layers that see everything): at a quarter and a tenth the tokens that INT4 has room for are worth
  more than their precision. At a half ``k8v4`` holds every token too, and nothing tells them apart there; on
  SmolLM2-135M, where both hold every token at a half, ``k8v4`` loses less. So in models of fewer than 32 key/value
  heads INT4, and ``k8v4`` from a half on.

So ``budget`` counts bytes: a fraction of what the whole cache takes in 16 bits, or the bytes of so many 16-bit tokens
per head. Codes, scales, positions, the recent tokens and places for 16 tokens to come are counted. 1.0 keeps everything
as it is. A fraction is a target for texts that are long: one of at most ``whole`` tokens, such as a chat prompt, keeps
all of them as they are: a quarter of forty tokens is no longer what was asked, and saves next to nothing. With
``bits=none`` the budget counts tokens, as everywhere else.

The rotation per position is read off the model's cosines and sines, of the longest forward that evicted. Where the
model passes none on in halves, or caches latents, keys and queries are taken as they are. Latent caches and
sliding-window layers are not packed; a sliding-window layer has a ranking and a budget of its own, in tokens.

Evicting waits until the last layer has read the prompt, so the peak of a prompt read at once is that of a full cache.
Tokens that come after it are packed and kept (``schedule=prefill``); with ``turn`` all are ranked anew at every later
prompt, with ``chunk`` whenever many come at once.

With ``agnostic=reconstruction`` the unknown question is stood for by KVzip's score (arXiv 2505.23416) in place of
distinctness: the prompt is read a second time, behind an instruction to repeat it, and a token counts by the largest
weight that it then gets. That costs several times what the prompt itself took, and on SmolLM2-135M nothing was seen to
come of it (``benchmarks/rivals_lengths.json``). Layers with a sliding window go by distinctness nevertheless.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..attention import reference, rope
from ..attention.codec import KVCodec, kv_codec
from ..call import AttentionCall, Site
from ..errors import UserError
from ._ranking import JointRanking, places
from ._second_reading import Rereading
from ._store import PolicyStore
from ._view import CacheView

__all__ = ["Hedge"]

_NEAR = 32  # tokens around a query that new text will have of its own
_FAR = 1e30  # a logit beside which no other has weight
_SMALLER = 64  # times smaller blocks of logits stay in the caches of a CPU, between the passes over them
_TO_COME = 16  # tokens that packed storage has places for from the beginning
_FEW = 0.2  # of the bytes: below it tokens are worth more than their precision
_HALF = 0.5  # of the bytes: from here on FP8 keys and INT4 values hold every token
_FEW_HEADS = 32  # of keys and values in the whole model: below it what one drops no other has
_FLOOR = 1e-3  # of the largest pair of a head, the least that a pair counts as


@dataclass(frozen=True, kw_only=True)
class Hedge(Rereading, JointRanking):
    """Distinct keys and what the prompt would look up next, ranked over all layers, stored in 8 or 4 bits.

    Attributes:
        budget: bytes, as a fraction of the 16-bit cache or as so many of its tokens per head; tokens if not packed.
        sinks: first tokens that are never dropped.
        recent: last tokens that are never dropped, and stay in the model's dtype.
        whole: a text of at most so many tokens keeps them all as they are, whatever the fraction; they are packed when
            it has grown longer.
        distinct: part of the ranking that is for the unknown question, between 0 and 1; the rest goes by foresight.
        agnostic: what that part goes by: ``distinctness``, or ``reconstruction``, for which prompts are read twice.
        chunk_size, instruct: of that second reading, as in ``kvzip``.
        window_size: last queries that are asked again.
        bits: ``int4``, ``k8v4`` for FP8 keys and INT4 values, ``fp8``, ``none`` for the model's own dtype, or ``auto``:
            INT4 where a fraction below 0.2 may stay, FP8 otherwise; in models of fewer than 32 key/value heads in all
            ``k8v4`` where a fraction of 0.5 or more may stay, INT4 otherwise.
    """

    sinks: int = field(default=4, metadata={"help": "first tokens that are never dropped"})
    recent: int = field(default=16, metadata={"help": "last tokens that are never dropped and stay in 16 bits"})
    whole: int = field(default=256, metadata={"help": "up to how many tokens a text is kept whole"})
    distinct: float = field(default=0.35, metadata={"help": "part of the ranking for the unknown question, 0 to 1"})
    agnostic: Literal["distinctness", "reconstruction"] = field(
        default="distinctness",
        metadata={"help": "what that part goes by: distinctness of keys, or kvzip's second reading of the prompt"},
    )
    window_size: int = field(default=512, metadata={"help": "last queries that are asked again"})
    bits: Literal["auto", "int4", "k8v4", "fp8", "none"] = field(
        default="auto",
        metadata={"help": "int4, k8v4 (FP8 keys, INT4 values), fp8, none (16 bits), or auto, by budget and model"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.distinct < 1:
            raise UserError(f"hedge: distinct is a part between 0 and 1, not {self.distinct}")
        if self.window_size < 1:
            raise UserError("hedge: window_size counts queries and is at least 1")
        if self.schedule not in ("prefill", "turn", "chunk"):
            raise UserError(
                f"hedge ranks the whole model at once: schedule is prefill, turn or chunk, not {self.schedule}"
            )
        super().__post_init__()

    @property
    def rereads(self) -> bool:  # type: ignore[override]
        return self.agnostic == "reconstruction"

    def reconstruct(self, call: AttentionCall, columns: slice, state: dict[str, Tensor]) -> None:
        if call.site.window is None:
            super().reconstruct(call, columns, state)

    def store(self, site: Site) -> PolicyStore:
        if self.rereads and site.latent is not None:
            raise UserError(
                f"hedge: {site.name} caches latents, which a second reading does not score: leave agnostic= away"
            )
        heads = (site.num_kv_heads or _FEW_HEADS) * len(site.peers)
        if self.bits != "auto" or heads >= _FEW_HEADS:
            return PolicyStore(self, site)
        half = isinstance(self.budget, float) and self.budget >= _HALF
        return PolicyStore(replace(self, bits="k8v4" if half else "int4"), site)

    @property
    def kept_whole(self) -> int:
        return self.whole

    @property
    def window(self) -> int:
        return self.window_size

    @property
    def codec(self) -> KVCodec | None:
        whole = isinstance(self.budget, float) and self.budget == 1.0
        if self.bits == "none" or whole:
            return None
        few = isinstance(self.budget, float) and self.budget < _FEW
        return kv_codec(("int4" if few else "fp8") if self.bits == "auto" else self.bits)

    @property
    def codec_window(self) -> int:
        return self.recent

    def key_scale(self, view: CacheView) -> Tensor | None:
        """1 / the largest norm of each rotary pair, or the largest size of each channel where pairs are unknown."""
        empty = (view.positions[:, 0] < 0)[..., None]
        tops = []
        for k in view.k.unbind(1):
            sizes = k.float().abs() if view.rotary is None else rope.pair_norms(k.float(), view.rotary[0].shape[-1])
            tops.append(sizes.masked_fill(empty, 0.0).amax(1))
        top = torch.stack(tops, 1)
        most = top.amax(-1, keepdim=True)
        return torch.where(most > 0, 1 / top.maximum(_FLOOR * most), 1.0)

    def rank(self, views: list[CacheView]) -> list[Tensor]:
        for view in views:
            view.angle_step()  # noted in its state
        keys = places([self._unknown(view) for view in views])
        uses = places([view.once(f"foresight {self.window_size}", foresight) for view in views])
        return [
            -torch.minimum(by_key / self.distinct, by_use / (1 - self.distinct))
            for by_key, by_use in zip(keys, uses, strict=True)
        ]

    def _unknown(self, view: CacheView) -> Tensor:
        """What stands for the unknown question, ``[B, Hs, N]``."""
        if self.rereads and view.site.window is None:
            return _stored(self.reconstruction(view), view)
        return view.once("distinctness", distinctness)

    def room(self, view: CacheView) -> Tensor:
        """Tokens of a head that the budget's bytes hold on average, ``[B]``."""
        slots = super().room(view)
        packing, (key, value) = self.codec, (view.k.shape[-1], view.v.shape[-1])
        if packing is None or view.site.window is not None or view.site.latent is not None or key != value:
            return slots
        codes = sum(c.encode(view.k.new_zeros(key))[0].nbytes for c in (packing.keys, packing.values))
        token = codes + 2 * 2 + 4  # two scales, a position
        rest = (self.recent + 1) * (4 * key + 4) + 6 * key + 72  # recent tokens, key factors and angles, counters
        packed = (slots * (4 * key) - rest - _TO_COME * token).div(token, rounding_mode="floor")
        packed = (packed + self.recent).clamp(min=self.protected)
        return torch.where(slots < view.counts, packed.minimum(view.counts), view.counts)


def _stored(x: Tensor, view: CacheView) -> Tensor:
    """``[B, Hkv, N]`` averaged to the heads as stored, -inf where there is no token, or none that later queries see."""
    out: Tensor = x.unflatten(1, (view.positions.shape[1], -1)).mean(2)
    return out.masked_fill(~_seen(view), -torch.inf)


def _seen(view: CacheView) -> Tensor:
    """Slots that hold a token which the next query sees, bool ``[B, Hs, N]``."""
    held = view.positions >= 0
    if view.site.window is None:
        return held
    return held & (view.positions > (view.counts - view.site.window)[:, None, None])


def _turned(x: Tensor, by: Tensor, step: Tensor | None) -> Tensor:
    """``x [B, H, T, d]`` turned on by ``by [B, T]`` positions."""
    if step is None:
        return x
    angles = by[..., None] * step[:, None]
    angles = torch.cat([angles, angles], -1)
    return rope.rotate(x, (angles.cos(), angles.sin()))


def distinctness(view: CacheView) -> Tensor:
    """How little each key has in common with the others of its head, positions aside: ``[B, Hs, N]``."""
    step, scores = view.angle_step(), []
    positions = view.positions.repeat_interleave(view.k.shape[1] // view.positions.shape[1], 1)
    for k, at in zip(view.k.unbind(1), positions.unbind(1), strict=True):  # a head at a time: float32 copies are large
        k = _turned(reference.widened(k)[:, None], -at.float(), step)[:, 0]
        k = torch.nn.functional.normalize(k, dim=-1).masked_fill((at < 0)[..., None], 0.0)
        scores.append(-torch.nn.functional.cosine_similarity(k, k.sum(1, keepdim=True), dim=-1))
    return _stored(torch.stack(scores, 1), view)


def foresight(view: CacheView) -> Tensor:
    """Root mean square of what each token adds to the output when the last queries are asked again: ``[B, Hs, N]``."""
    assert view.queries is not None
    order = view.queries.positions.argsort(
        dim=1, stable=True
    )  # padding first, then one query a position up to the last
    asked = view.queries.positions.gather(1, order)
    q = view.queries.q.gather(2, order[:, None, :, None].expand_as(view.queries.q))
    (batch, heads, size, _), step = view.k.shape, view.angle_step()
    beside = _beside(view, q).clamp(min=-_FAR).masked_fill((asked < 0)[:, None], _FAR)  # then nothing else has weight
    hidden = torch.zeros_like(view.positions, dtype=beside.dtype).masked_fill(~_seen(view), -torch.inf)
    # What a query sees beside the tokens is a last column of the logits.
    hidden = torch.nn.functional.pad(reference.repeat_kv(hidden, heads), (0, 1))[:, :, None]
    k = torch.nn.functional.pad(reference.widened(view.k), (0, 0, 0, 1)).transpose(-1, -2)
    groups, total = q.shape[1] // heads, beside.new_zeros(batch, heads, size + 1)
    block = max(1, reference.block_size(k, total.numel() * groups) // (_SMALLER if k.device.type == "cpu" else 1))
    for x, at, near in zip(q.split(block, 2), asked.split(block, 1), beside.split(block, 2), strict=True):
        again = _turned(reference.widened(x), (view.counts[:, None] - at).float(), step) * view.scale
        again = again.unflatten(1, (heads, groups)).flatten(2, 3)  # [B, Hkv, G T, d]: keys are not repeated
        if view.softcap is None:
            z = torch.baddbmm(hidden.flatten(0, 1), again.flatten(0, 1), k.flatten(0, 1)).unflatten(0, (batch, heads))
        else:
            z = torch.tanh(again @ k / view.softcap) * view.softcap + hidden
        z[..., -1] = near.unflatten(1, (heads, groups)).flatten(2)
        total += z.softmax(-1).square_().sum(2)
    mean = total[..., :-1] / ((asked >= 0).sum(1).clamp(min=1)[:, None, None] * groups)
    return _stored(mean.sqrt() * torch.linalg.vector_norm(reference.widened(view.v), dim=-1), view)


def _beside(view: CacheView, q: Tensor) -> Tensor:
    """Log-sum-exp ``[B, H, W]`` of the logits of the tokens near each of the last queries, ``[B, H, W, d]``, in place.

    Query W - 1 is that of the last position, each before it one position earlier. Where padding comes first instead,
    and for a query of which no near token is left, the result means nothing, or is -inf.
    """
    heads, asked = view.k.shape[1], q.shape[2]
    more = -asked % _NEAR
    blocks = (asked + more) // _NEAR
    # The key of each position from the first that is near to a query; _NEAR queries look at 2 _NEAR of them.
    place = view.positions - (view.counts - blocks * _NEAR - _NEAR)[:, None, None]
    place = place.where((view.positions >= 0) & (place >= 0), (blocks + 1) * _NEAR)
    slot = place.new_full((*place.shape[:2], (blocks + 1) * _NEAR + 1), -1)
    slot = slot.scatter(2, place, torch.arange(place.shape[2], device=place.device).expand_as(place))[..., :-1]
    slot = reference.repeat_kv(slot[..., None], heads)[..., 0]
    k = view.k.gather(2, slot.clamp(min=0)[..., None].expand(-1, -1, -1, view.k.shape[3]))
    k = reference.widened(k.masked_fill(slot[..., None] < 0, 0.0)).unfold(2, 2 * _NEAR, _NEAR)  # [B, Hkv, n, d, 2 NEAR]
    q = torch.nn.functional.pad(reference.widened(q), (0, 0, more, 0))
    q = q.unflatten(2, (blocks, _NEAR)).unflatten(1, (heads, -1)).transpose(2, 3)  # [B, Hkv, n, G, NEAR, d]
    x = reference.logits(q.flatten(3, 4).flatten(0, 1), k.mT.flatten(0, 1), scale=view.scale, softcap=view.softcap)
    x = x.unflatten(0, (-1, heads)).unflatten(3, (-1, _NEAR))
    behind = torch.arange(2 * _NEAR, device=q.device) - torch.arange(_NEAR, device=q.device)[:, None]
    held = (slot >= 0).unfold(2, 2 * _NEAR, _NEAR)[:, :, :, None, None]
    x = x.masked_fill(~(held & (behind > 0) & (behind <= _NEAR)), -torch.inf)
    x = x.transpose(2, 3).flatten(1, 2).flatten(2, 3)  # [B, H, n NEAR, 2 NEAR]
    return reference.logsumexp(x, None, view.sinks)[:, :, more:]
