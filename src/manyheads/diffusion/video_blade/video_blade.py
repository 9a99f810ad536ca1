# SPDX-License-Identifier: Apache-2.0
"""Adaptive block-sparse attention (ASA) of video transformers: blocks of tokens that lie together, scored by samples.

Most attention of a video token falls on few places of the video. Tokens are put in the order of a Hilbert curve through
frames, rows and columns, so that a block of consecutive ones is a compact piece of the video, and each block of queries
reads only the key blocks that matter. Which do is estimated without any map: ``samples`` tokens of every block are
drawn, and with their logits s

    score(I, J) = max over r in I of exp(max over j in J of s_rj - max over all j of s_rj),

normalised to sum 1 over J. Of these the fewest blocks with ``mass`` are read, between the shares ``least`` and ``most``
of all blocks. Blocks that hold text (joint attention) read and are read always. With ``pool`` tokens in a window every
query also reads the mean key and value of each window of the video, with the logarithm of its size added to the logit:
the two attentions are merged by their log-sum-exp, which is one softmax over both sets of keys.

Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation. The few-step distillation
with this attention in the loop is :mod:`manyheads.training.step_distillation` and ``recipes/video_blade.py``.

Shapes: q, k, v ``[B, H, T, d]`` after norms and rotary positions; scores ``[B, H, n, n]`` of n blocks.

Choices. The released code reads one block fewer than it takes to reach ``mass`` (it uses the index of the last as their
number); here the mass is reached. Tokens are drawn without replacement, from a seed, the module's place and the step,
so that a run can be repeated. The share of blocks is rounded to a number, at least 1. The order is applied around the
attention and undone behind it; the released models reorder once. Selected blocks are counted a second time within their
windows' means, as in the paper. Attention over the tokens of one frame (UNets, Latte, images) is treated as a video of
one frame. The model's own attention is kept where tokens are of text alone or of one place over time; and, with a
warning once, where a bias or a mask by queries is given, where there is a single block, and on a GPU below
``from_tokens``, where dense attention is faster (benchmarks/video_blade.py). On a CPU it acts at any length.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ...attention import patterns
from ...attention.block_pattern import BlockPattern, Rule, blocks_of
from ...attention.reference import repeat_kv, widened
from ...attention.space_filling import hilbert_order
from ...attention.sparse import block_sparse_attention, merge
from ...call import AttentionCall, DiffusionStep
from ...errors import UserError
from ...strategy import AttentionCompute

__all__ = ["Plan", "VideoBlade", "pooled_attention", "sampled_scores"]

_log = logging.getLogger(__name__)
_LOGITS = 2**27  # of samples, at once
_OPEN = Rule(causal=False)
_ELSEWHERE = "attention to or among other tokens than an image's or a video's is left to the model"


class Plan(NamedTuple):
    """What a call reads.

    Attributes:
        order: ``[T]``, the token that stands at each place of the order.
        video: how many of them are of the video; they come first.
        pattern: blocks that are read, in that order.
        valid: ``[B, T]`` keys that are tokens, in that order; None for all.
    """

    order: Tensor
    video: int
    pattern: BlockPattern
    valid: Tensor | None


@dataclass(frozen=True, kw_only=True)
class VideoBlade(AttentionCompute):
    """Block-sparse attention whose blocks are chosen by sampled scores.

    Attributes:
        block: tokens of a block.
        samples: tokens drawn of a block.
        mass: share of the scores that is read.
        least, most: bounds on the share of the blocks (the released code has a ``most`` of 0.17 for Wan, 0.10 for
            CogVideoX).
        pool: tokens of a window whose mean all read (30 for Wan, 15 for CogVideoX); 0 for none.
        order: of the tokens: along a Hilbert curve, or row by row as the model has them.
        from_tokens: shorter attention on a GPU is left to the model.
        seed: of the draws.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self", "joint"})

    block: int = field(default=128, metadata={"help": "tokens of a block"})
    samples: int = field(default=32, metadata={"help": "tokens of a block that its score is made of"})
    mass: float = field(default=0.95, metadata={"help": "share of the scores that is read; 1 reads `most`"})
    least: float = field(default=0.05, metadata={"help": "least share of the blocks"})
    most: float = field(default=0.17, metadata={"help": "largest share of the blocks"})
    pool: int = field(default=0, metadata={"help": "tokens of a window whose mean all read (30 for Wan); 0 for none"})
    order: Literal["hilbert", "raster"] = field(default="hilbert", metadata={"help": "order that blocks are cut from"})
    from_tokens: int = field(default=8192, metadata={"help": "on a GPU, shorter attention stays dense: it is faster"})
    seed: int = field(default=0, metadata={"help": "of the draws"})

    def __post_init__(self) -> None:
        if min(self.block, self.samples) < 1 or self.pool < 0:
            raise UserError(f"{self.slug}: block and samples count at least 1, pool at least 0")
        if not (0 < self.mass <= 1 and 0 <= self.least <= self.most <= 1):
            raise UserError(f"{self.slug}: mass is a share above 0 and up to 1, and 0 <= least <= most <= 1")

    def attend(self, call: AttentionCall) -> Tensor | None:
        if (reason := self.refusal(call)) is not None:
            if reason != _ELSEWHERE:
                _tell(reason)
            return None
        order, _ = self._order(call)
        q, k, v = (x[:, :, order] for x in (call.q, call.k, call.v))
        plan = self._plan(call, q, k)
        out, lse = block_sparse_attention(
            q, k, v, plan.pattern, scale=call.scale, causal=False, valid=plan.valid, lse=True
        )
        if self.pool:
            coarse = pooled_attention(q, k[:, :, : plan.video], v[:, :, : plan.video], self.pool, scale=call.scale)
            out, _ = merge((out, coarse[0]), (lse, coarse[1]))
        back = torch.empty_like(plan.order)
        back[plan.order] = torch.arange(len(back), device=back.device)
        return out[:, :, back].transpose(1, 2)

    def refusal(self, call: AttentionCall) -> str | None:
        """Why the model's own attention is kept; None where it is not.

        Raises:
            UserError: how the tokens of this model lie is not known.
        """
        step, length = call.diffusion, call.q.shape[2]
        if step is None or step.layout is None:
            raise UserError(
                f"{self.slug}: how the tokens of {call.site.name} lie is not known; leave this denoiser dense"
            )
        if step.axis in ("text", "time") or _grid(step, length) is None or call.k.shape[2] != length:
            return _ELSEWHERE
        if call.bias is not None or call.is_causal or call.dropout or call.softcap or call.sinks is not None:
            return "attention with a bias, a cap, sinks or dropout is left to the model"
        if call.mask is not None and (call.mask.ndim != 4 or call.mask.shape[1] != 1 or call.mask.shape[2] != 1):
            return "attention with a mask that differs between queries or heads is left to the model"
        if length <= self.block:
            return f"attention over {length} tokens is one block of {self.block}, and left to the model"
        if call.q.is_cuda and length < self.from_tokens:
            return f"attention over {length} tokens is left to the model: below {self.from_tokens} dense is faster"
        return None

    def plan(self, call: AttentionCall) -> Plan:
        """Order and blocks of a call that is not refused."""
        order, _ = self._order(call)
        return self._plan(call, call.q[:, :, order], call.k[:, :, order])

    def _plan(self, call: AttentionCall, q: Tensor, k: Tensor) -> Plan:
        """The same, of q and k in order."""
        order, video = self._order(call)
        valid = None
        if call.mask is not None:
            valid = call.mask[:, 0, 0].expand(q.shape[0], -1)[:, order]
        return Plan(order, video, self._pattern(call, q, repeat_kv(k, q.shape[1]), video, valid), valid)

    def scores(self, call: AttentionCall, q: Tensor, k: Tensor, valid: Tensor | None) -> Tensor:
        """Logarithms of the scores ``[B, H, n, n]`` of blocks of q and k ``[B, H, T, d]``, which are in order."""
        step = call.diffusion
        source = torch.Generator().manual_seed(
            self.seed + 1_000_003 * call.site.index + 7919 * ((step.index or 0) if step else 0)
        )
        few = min(self.samples, self.block)
        draws = torch.rand(2, q.shape[1], self.block, generator=source).argsort(-1)[..., :few]
        rows, columns = draws.to(q.device, non_blocking=True)
        return sampled_scores(q, k, rows, columns, scale=call.scale, block=self.block, valid=valid)

    def _order(self, call: AttentionCall) -> tuple[Tensor, int]:
        assert call.diffusion is not None and call.diffusion.layout is not None
        layout, length, grid = call.diffusion.layout, call.q.shape[2], _grid(call.diffusion, call.q.shape[2])
        assert grid is not None
        key = f"{self.order} {layout} {length} {call.q.device}"
        if key not in call.state:
            image = layout.image(length) if call.site.kind == "joint" else slice(0, math.prod(grid))
            video = hilbert_order(*grid) if self.order == "hilbert" else range(math.prod(grid))
            call.state[key] = torch.tensor(_with_text(video, image.start, length), device=call.q.device)
        order: Tensor = call.state[key]
        return order, math.prod(grid)

    def _pattern(self, call: AttentionCall, q: Tensor, k: Tensor, video: int, valid: Tensor | None) -> BlockPattern:
        length = q.shape[2]
        n = blocks_of(length, self.block)
        least, most = (min(n, max(1, round(share * n))) for share in (self.least, self.most))
        with torch.no_grad():
            pattern = patterns.top_p(
                self.scores(call, q, k, valid), min(self.mass, 1.0), length, length, rule=_OPEN,
                least=most if self.mass >= 1 else least, most=most, block_q=self.block, block_k=self.block,
            )  # fmt: skip
        if video == length:
            return pattern
        text = torch.arange(n, device=q.device) >= video // self.block
        return pattern | BlockPattern.from_blocks(
            (text[:, None] | text)[None, None], length, length, block_q=self.block, block_k=self.block, most=n
        )


def _grid(step: DiffusionStep, length: int) -> tuple[int, int, int] | None:
    """Frames, rows and columns of the image or video tokens among ``length``; None where these are other tokens."""
    layout = step.layout
    if layout is None:
        return None
    if length in (layout.tokens, layout.tokens + layout.text):
        return layout.frames, layout.height, layout.width
    frame = layout.grid(length) if layout.frames == 1 or step.axis == "space" else None
    return None if frame is None else (1, *frame)


def _with_text(video: Sequence[int], first: int, length: int) -> list[int]:
    """The order of a sequence of video tokens that begin at ``first``, and text, which comes last."""
    return [first + i for i in video] + [i for i in range(length) if not first <= i < first + len(video)]


def sampled_scores(
    q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, *, scale: float, block: int, valid: Tensor | None = None
) -> Tensor:
    """Logarithms of the scores of key blocks for blocks of queries, float32 (float64 for float64) ``[B, H, n, n]``.

    Args:
        q, k: ``[B, H, T, d]``; where the last block is cut off, its last token is taken for those that are missing.
        rows, columns: ``[H, s]``, which tokens of a block are drawn, of queries and keys.
        scale: factor on the product.
        block: tokens of a block.
        valid: ``[B, T]``, keys that are tokens; a block whose drawn keys are none gets -inf.
    """
    length, n = q.shape[2], int(blocks_of(q.shape[2], block))
    start = torch.arange(n, device=q.device)[:, None] * block
    at = [(start + draws[:, None]).clamp(max=length - 1) for draws in (rows, columns)]  # [H, n, s]
    batch, heads, _, width = q.shape
    queries, keys = (
        x.gather(2, i.flatten(1)[None, :, :, None].expand(batch, -1, -1, width)).unflatten(2, (n, -1))
        for x, i in zip((q, k), at, strict=True)
    )
    real = None if valid is None else valid[:, at[1].flatten()].view(batch, heads, 1, 1, n, -1)
    few, made = keys.shape[3], []
    turned = keys.flatten(2, 3).transpose(2, 3)
    for part in queries.split(max(1, _LOGITS // (batch * heads * few * n * few)), 2):
        logits = (part.flatten(2, 3) @ turned).view(batch, heads, part.shape[2], -1, n, few)  # [B, H, I, r, J, s]
        if real is not None:
            logits = logits.masked_fill(~real, -torch.inf)
        best = widened(logits.amax(-1)) * scale
        made.append((best - best.amax(-1, keepdim=True)).amax(3))
    return torch.cat(made, 2)


def pooled_attention(q: Tensor, k: Tensor, v: Tensor, size: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the means of windows of keys and values, each counted as often as it has tokens.

    Args:
        q: ``[B, H, T, d]``.
        k, v: ``[B, Hkv, S, d]`` and ``[B, Hkv, S, dv]``.
        size: tokens of a window; the last one may have fewer.
        scale: factor on the product.

    Returns:
        Output ``[B, H, T, dv]`` and log-sum-exp ``[B, H, T]``.
    """
    length, tokens = q.shape[2], k.shape[2]
    keys, values = (patterns.block_means(x, size).to(x.dtype) for x in (k, v))
    count = torch.full((keys.shape[2],), float(size), dtype=torch.float64, device=q.device)
    count[-1] = tokens - size * (len(count) - 1)
    rows, n = blocks_of(length, 128), blocks_of(len(count), 128)
    lists = torch.arange(n, dtype=torch.int32, device=q.device).expand(1, 1, rows, n).contiguous()
    every = BlockPattern(lists, 128, 128, length, len(count))
    bias = count.log().to(q.dtype if q.dtype == torch.float64 else torch.float32)[None, None]
    return block_sparse_attention(q, keys, values, every, scale=scale, causal=False, key_bias=bias, lse=True)


@cache
def _tell(reason: str) -> None:
    """Say once a process why attention stays dense."""
    _log.warning("video_blade: %s", reason)
