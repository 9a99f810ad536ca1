# SPDX-License-Identifier: Apache-2.0
"""Training on long sequences by a grid of processes that share heads along one side and tokens along the other.

LoongTrain: Efficient Training of Long-Sequence LLMs with Head-Context Parallelism (arXiv 2406.18485). Ring attention
alone (Megatron's context parallelism) sends ``(W - 1) / W`` of all keys and values round and is bound by them for
grouped heads or short blocks; an all-to-all over heads alone (DeepSpeed-Ulysses) ends at the number of key/value heads.
The paper does both, in a grid of ``W = heads x contexts``:

    1  k, v    repeated where there are fewer than ``heads``:  H' = max(H_kv, heads)
    2  q, k, v [s, H, d] -> [s heads, H / heads, d]     all-to-all among ``heads`` processes, s = S / W
    3  ring attention among the ``contexts`` that have the same heads; causal, so tokens lie in a zigzag
    4  out     back to [s, H, d]                        all-to-all

Numbers sent by a process, forward, of keys and values as wide as queries (``d``):

    all-to-all   s d (2 H + 2 H') (heads - 1) / heads      and H of the log-sum-exp, where the paper has none
    ring         (contexts - 1) (S / contexts) (H' / heads) 2 d

Double ring: with ``window`` < ``contexts`` blocks go round in windows of so many processes, while the block that each
process of a window began with is on its way to the next window, so that links within and between machines both work.

Placement: ``place=head`` puts processes that share heads beside each other (the all-to-all stays within a machine, the
ring goes between machines), ``place=context`` those of a ring.

Selective Checkpoint++: :func:`manyheads.parallel.keep_attention` is the ``context_fn`` of activation checkpointing that
keeps the attention output and log-sum-exp of each layer and computes the rest again, so that attention runs forward
once. Hybrid ZeRO: :func:`shard_parameters` shards parameters, gradients and optimiser states over all processes, those
with other batches and those with other tokens, by FSDP2.

    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_attention})
    shard_parameters(model, mesh["data", "sequence"])
    with manyheads.use(model, "loongtrain:heads=4", mesh=mesh["sequence"]):
        model(input_ids=ids, labels=ids).loss.backward()

The paper's code (InternEvo) was not at hand: the schedule of the double ring is derived from the paper's text and
checked block by block. Where the paper is for causal masks, any mask of the library is exact here; that ``out`` and the
log-sum-exp are kept in the width of the accumulation is ours, and so is that q, k and v are exchanged once more when
their layer is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

from ..errors import UserError
from ..parallelism import ContextParallelism
from ._context import ContextParallel

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from . import AttnMask, Layout, World

__all__ = ["LoongTrain", "numbers_sent", "shard_parameters"]


@dataclass(frozen=True, kw_only=True)
class LoongTrain(ContextParallelism):
    """Attention by a grid of processes.

    Attributes:
        heads: processes that share heads among them; divides their number, and they divide the query heads.
        window: of the inner ring, in processes; all that share tokens when None.
        place: whether neighbouring ranks share heads or context.
    """

    heads: int = field(default=1, metadata={"help": "processes that share heads among them"})
    window: int | None = field(default=None, metadata={"help": "processes of an inner ring; one ring when not given"})
    place: Literal["head", "context"] = field(default="head", metadata={"help": "what neighbouring processes share"})

    def __post_init__(self) -> None:
        if self.heads < 1 or (self.window is not None and self.window < 1):
            raise UserError("loongtrain: heads and window count processes, 1 or more")

    def share(self, world: World, mask: AttnMask, layout: Layout | None = None) -> ContextParallel:
        return ContextParallel(world, mask, layout or "zigzag", "ring", self.heads, self.window, self.place)


def numbers_sent(
    tokens: int, world: int, heads: int, q_heads: int, kv_heads: int, head_dim: int, window: int | None = None
) -> dict[str, int]:
    """Numbers that a process sends forward in one layer, by kind of exchange; ``2 world`` divides ``tokens``.

    Args:
        tokens: S, of the whole.
        world, heads: processes, and those that share heads.
        q_heads, kv_heads: of the layer.
        head_dim: channels of a head.
        window: of the inner ring.
    """
    contexts = world // heads
    window = window or contexts
    kv = max(kv_heads, heads)
    block = tokens // contexts * kv // heads * 2 * head_dim
    windows = contexts // window
    return {
        "all-to-all": tokens // world * (head_dim * (2 * q_heads + 2 * kv) + q_heads) * (heads - 1) // heads,
        "ring": windows * (window - 1) * block,
        "ring between windows": (windows - 1) * block,
    }


def shard_parameters(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard parameters, gradients and optimiser states over all processes, layer by layer (the paper's hybrid ZeRO).

    Gradients are added among processes that share tokens, and averaged among those with other batches. Make the
    optimiser afterwards, and leave ``sum_gradients`` away.

    Args:
        model: on the device of the mesh.
        mesh: of processes that share the tokens of one batch, or of two dimensions: other batches, and those.

    Raises:
        UserError: the mesh has more dimensions.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if mesh.ndim > 2:
        raise UserError(f"shard_parameters takes a mesh of batches and tokens, as mesh['data', 'sequence'], not of "
                        f"{mesh.ndim} dimensions")  # fmt: skip
    batches = mesh.size(0) if mesh.ndim == 2 else 1
    mesh = mesh._flatten() if mesh.ndim == 2 else mesh
    for part in model.modules():
        if isinstance(part, nn.ModuleList):
            for layer in part:
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(float(batches))
            part.set_force_sum_reduction_for_comms(True)  # gloo has no other, and of NCCL's others none is as fast
