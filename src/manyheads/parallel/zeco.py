# SPDX-License-Identifier: Apache-2.0
"""ZeCO: a sequence of linear attention on many devices, each of which sends one state, however many there are.

Linear attention keeps what came before in a state of dk x dv numbers a head. So a process needs one state of the one
before it, not keys and values of all. Local states are made first; while they travel, what needs none is computed.

ZeCO: Zero Communication Overhead Sequence Parallelism for Linear Attention (arXiv 2507.01004). For process p with
tokens t, gates a_t, their product A_t up to t and A over all of its tokens:

    local      S_p and o_t from a state of zeros                 sent       S_in(p + 1) = A S_in(p) + S_p: the All-Scan
    corrected  o_t + (q_t * A_t) S_in(p)
    back       dS_in(p) = sum_t (q_t * A_t)^T do_t + A dS_in(p + 1), the same scan from the last process to the first;
               dA = rowsum(dS_in(p + 1) * S_in(p)), which goes to the gates

The state is cut into K pieces; a process adds its own to one while the next arrives. :mod:`manyheads.parallel._scan`
has that chain, with K that the alpha-beta model finds fastest, and in its place a scan by doubling, which takes log2 P
messages, and the all-gather of LASP-2; ``exchange=auto`` takes what the model says is fastest.

Beside the paper's gates of channels (GLA): decay of heads (RetNet, lightning attention), gates of heads (Mamba-2),
HGRN2's, and the gated delta rule, whose A is a matrix; HGRN's own recurrence is one of heads with one channel. Any
length, any shares, also none; a gate of 0 (``g = -inf``) starts a document. Where a GPU has Triton and gates are of
heads, local passes, outputs and gradients are those of :mod:`manyheads.kernels.recurrence`.

Chosen here, where the paper leaves it open: pieces are cut along dv, along which any A acts the same (the paper: along
dk); states travel in float32; with kernels, outputs are made from a state that has come where the model says that the
exchange takes less than the correction (``overlap=true``: never, as in the paper); a normaliser's sums travel as one
more column of the state, and with kernels outputs then wait. Softmax layers of a model that has both kinds share their
tokens by a cast of the keys that are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import kernels
from ..attention.gated import Outputs, channel_gated, delta_rule, suffixes
from ..attention.recurrence import LEAST, DecayState, Norm, SharedState, chunk, divide
from ..attention.reference import repeat_kv
from ..errors import UserError
from ..parallelism import ContextParallelism, StateParallelism
from . import _cost
from ._context import ContextParallel, World
from ._layouts import Layout
from ._masks import AttnMask
from ._scan import SCANS, StateScan, apply

__all__ = ["LinearParallel", "ZeCO"]

_MEMORY = 2.5e12  # bytes per second that an A100 or H100 reads or writes, about


@dataclass(frozen=True, kw_only=True)
class ZeCO(StateParallelism, ContextParallelism):
    """See the head of this file."""

    exchange: Literal["chain", "doubling", "all_gather", "auto"] = field(
        default="chain",
        metadata={"help": "of states: chain (the paper's), doubling, all_gather, auto: by the model"},
    )
    pieces: int | None = field(default=None, metadata={"help": "of a chain; the model's best when not given"})
    overlap: bool | None = field(
        default=None, metadata={"help": "outputs are made while states travel, and corrected; or as modelled"}
    )
    cluster: str = field(default="h100", metadata={"help": f"whose links the model has: {', '.join(_cost.CLUSTERS)}"})

    def __post_init__(self) -> None:
        if self.exchange not in ("auto", *SCANS):
            raise UserError(f"zeco: exchange is {', '.join(SCANS)} or auto, not {self.exchange!r}")
        if self.pieces is not None and self.pieces < 1:
            raise UserError(f"zeco: pieces counts from 1, and is not {self.pieces}")
        if self.cluster not in _cost.CLUSTERS:
            raise UserError(f"zeco: there is no cluster {self.cluster!r}; there are {', '.join(_cost.CLUSTERS)}")

    def share_states(self, world: World) -> LinearParallel:
        peers = world.peers([list(range(world.size))])
        link = _cost.CLUSTERS[self.cluster].link(world.size)
        return LinearParallel(StateScan(peers, self.exchange, self.pieces, link), self.overlap)

    def share(self, world: World, mask: AttnMask, layout: Layout | None = None) -> ContextParallel:
        return ContextParallel(world, mask, layout or "contiguous", "group_cast")


class LinearParallel:
    """Linear attention whose tokens processes share: each has some that follow each other, in the order of ranks.

    Every process makes the same calls in the same order, also for gradients.

    Attributes:
        scan: of states over the processes.
        overlap: make outputs from zeros while the state travels, and correct them; or wait, and make them from it.
            None: by the model, where there are kernels for the latter; else True.
    """

    def __init__(self, scan: StateScan, overlap: bool | None = None) -> None:
        self.scan, self.overlap = scan, overlap

    @property
    def first(self) -> bool:
        """Whether this process has the first tokens."""
        return self.scan.peers.rank == 0

    def mine(self, length: int) -> slice:
        """The tokens of this process, of so many; shares differ by one at most."""
        count, rank = len(self.scan.peers), self.scan.peers.rank
        return slice(length * rank // count, length * (rank + 1) // count)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, scale: float = 1.0, norm: Norm = None,
        floor: Tensor | None = None, state: DecayState | None = None, impl: Literal["auto", "torch", "triton"] = "auto",
    ) -> tuple[Tensor, DecayState]:  # fmt: skip
        """Linear attention with decay; arguments as for :func:`manyheads.attention.recurrence.decay_attention`.

        Args:
            q: ``[B, H, T, K]``, the tokens of this process; T may differ between processes, and be 0.
            k: ``[B, Hkv, T, K]``; Hkv divides H, and is H where gates are of channels.
            v: ``[B, Hkv, T, V]``.
            g: log decay ``[Hkv]``, ``[B, Hkv, T]`` or, of channels, ``[B, Hkv, T, K]``; -inf at the first token of a
                document.
            scale: factor on q.
            norm: None, ``sum`` or ``mlstm``, the latter with ``floor [B, H, T]``.
            state: before the first token of all; process 0 starts from it, others do not look at it.
            impl: ``auto`` takes the kernels on a GPU, torch elsewhere.

        Returns:
            Output ``[B, H, T, V]`` in the dtype of ``q``, and the state after this process's last token.

        Raises:
            UserError: shapes that do not belong together.
        """
        start = state if self.first else None
        if g is not None and g.ndim == 4:
            if norm is not None or k.shape != q.shape or g.shape != k.shape:
                raise UserError(f"gates of channels want q, k and g of one shape and no norm; g is {tuple(g.shape)}")
            local = channel_gated(_wide(q), _wide(k), _wide(v), _wide(g), scale)
            out, kv = self._from_zeros(local, None if start is None else start.kv)
            return out.to(q.dtype), DecayState(kv)
        held = q.is_cuda and q.dtype != torch.float64 and max(q.shape[3], v.shape[3]) <= 256 and q.shape[2] > 0
        if impl == "triton" or (impl == "auto" and held and kernels.available()):
            from ..kernels.shared_recurrence import shared_decay_attention

            before, sums = (None, None) if start is None else (start.kv, start.k)
            overlap = norm is None and self._pays(q, v) if self.overlap is None else self.overlap and norm is None
            out, kv, n = shared_decay_attention(q, k, v, g, scale, norm, floor, before, sums, self.scan.begin, overlap)
            return out, DecayState(kv, n)
        return self._in_torch(q, k, v, g, scale, norm, floor, start)

    def delta(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *, scale: float = 1.0,
        state: DecayState | None = None,
    ) -> tuple[Tensor, DecayState]:  # fmt: skip
        """The gated delta rule, see :mod:`manyheads.attention.gated`; in torch.

        Args:
            q, k: ``[B, H, T, K]``, the tokens of this process; k of norm 1 as a rule.
            v: ``[B, H, T, V]``.
            beta: ``[B, H, T]``.
            g: log decay ``[B, H, T]``, at most 0, or None.
            scale: factor on q.
            state: as for :meth:`attend`.

        Returns:
            As :meth:`attend`.
        """
        start = state.kv if state is not None and self.first else None
        out, kv = self._from_zeros(delta_rule(_wide(q), _wide(k), _wide(v), _wide(beta), g, scale), start)
        return out.to(q.dtype), DecayState(kv)

    def last(self, state: DecayState) -> DecayState:
        """The state after all tokens, of that after each process's; in every process, without gradients."""
        return DecayState(self.scan.last(state.kv), None if state.k is None else self.scan.last(state.k))

    def states(self, model: nn.Module, batch: int, start: int) -> list[Any]:
        """What a :class:`manyheads.models.decoder.Decoder` takes as its ``state`` for the tokens of this process.

        Args:
            model: whose mixers have ``shared_state``: those that keep nothing but sums with decay.
            batch: sequences.
            start: tokens of a sequence that stand in the processes before this one.

        Raises:
            UserError: a mixer that keeps something else.
        """
        found: list[Any] = []
        blocks: Any = model.blocks
        for block in blocks:
            if not hasattr(block.mixer, "shared_state"):
                kind = type(block.mixer).__name__
                raise UserError(f"zeco passes on states of linear attention, and {kind} has others: share "
                                "minimax_hybrid:every=0, tnl_lightning or dijiang")  # fmt: skip
            weight = next(block.mixer.parameters())
            seen = torch.full((batch,), start, device=weight.device)
            found.append(block.mixer.shared_state(SharedState(weight.new_empty(0), attend=self.attend), seen))
        return found

    def _pays(self, q: Tensor, v: Tensor) -> bool:
        """Whether an exchange is modelled to take longer than to correct outputs: to read and write five like them."""
        state = v.new_empty(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float32, device="meta")
        times = self.scan.times(state[..., 0], state)
        return times[self.scan.chosen(state[..., 0], state)] > 5 * v.nbytes / _MEMORY

    def _in_torch(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, norm: Norm, floor: Tensor | None,
        start: DecayState | None,
    ) -> tuple[Tensor, DecayState]:  # fmt: skip
        batch, heads, length = k.shape[:3]
        dtype, width = q.dtype, v.shape[3]
        q, k, v = (_wide(x) for x in (q, k, v))
        gate = k.new_zeros(batch, heads, length) if g is None else g.to(k.dtype)
        gate = (gate[None, :, None].expand(batch, heads, length) if gate.ndim == 1 else gate).clamp_min(LEAST)
        before = None if start is None else start.kv
        if norm is not None:  # the sum of the keys is what a value of 1 leaves
            v = torch.cat([v, v.new_ones(*v.shape[:3], 1)], 3)
            if start is not None and start.k is not None:
                before = torch.cat([start.kv, start.k[..., None]], 3)

        def outputs() -> tuple[Tensor, Tensor]:
            carried = scale * q * repeat_kv(gate.cumsum(2), q.shape[1])[..., None].exp()
            return chunk(q, k, v, gate, scale=scale)[0], carried

        m = gate.sum(2, keepdim=True).exp()
        s = (k * suffixes(gate).exp()[..., None]).mT @ v
        out, kv = self._from_zeros((m, s, outputs), before)
        if norm is None:
            return out.to(dtype), DecayState(kv)
        out = divide(out[..., :width], out[..., width], norm, floor)
        return out.to(dtype), DecayState(kv[..., :width], kv[..., width])

    def _from_zeros(self, local: tuple[Tensor, Tensor, Outputs], start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Outputs and the state after, of a run from a state of zeros, and of one before all tokens."""
        m, s, outputs = local
        if start is not None:
            s = s + apply(m, start.to(s.dtype))
        if self.overlap is not False:
            before, (out, carried) = self.scan.state(m, s, outputs)
        else:
            before, _ = self.scan.state(m, s, lambda: None)
            out, carried = outputs()
        after = s + apply(m, before)
        entered = before if start is None else before + start.to(s.dtype)
        return out + carried @ repeat_kv(entered, carried.shape[1]), after


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
