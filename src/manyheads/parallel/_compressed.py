# SPDX-License-Identifier: Apache-2.0
"""Gradients that are summed over processes in few bits on the way and in float32 where they arrive.

A ring of a reduce-scatter adds at every hop; in bfloat16 it rounds at each, so that the error grows with the number of
processes. An all-to-all of the same parts, added in float32 where they arrive, rounds each number once, before it
leaves: the error does not depend on how many there are, and bfloat16 sends half the bytes of a float32 reduce-scatter.
``float8`` (E4M3) sends a scale in float32 for every ``block`` numbers, so a quarter and a little.

    model = DistributedDataParallel(model)
    model.register_comm_hook(CompressedReduceScatter(World()), compressed_hook)
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import GradBucket  # type: ignore[attr-defined]

from ..errors import UserError
from ._context import World
from ._peers import Peers

__all__ = [
    "FORMATS",
    "CompressedReduceScatter",
    "Format",
    "compressed_hook",
    "decode",
    "encode",
    "ring_sum",
    "summed_rows",
]

Format = Literal["float32", "bfloat16", "float8"]
FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "float8")
_E4M3 = 448.0  # its largest number


def encode(x: Tensor, kind: Format, block: int = 128) -> tuple[Tensor, ...]:
    """What is sent of ``x [..., N]``: for ``float8`` codes as uint8, which every backend sends, and their scales.

    Args:
        x: float32.
        kind: of what is sent.
        block: consecutive numbers that share a scale, which makes the largest of them 448; divides N.
    """
    if kind != "float8":
        return (x.to(torch.bfloat16 if kind == "bfloat16" else torch.float32),)
    parts = x.unflatten(-1, (-1, block))
    scales = parts.abs().amax(-1, keepdim=True) / _E4M3
    codes = (parts / scales.clamp_min(torch.finfo(torch.float32).tiny)).to(torch.float8_e4m3fn)
    return codes.flatten(-2).view(torch.uint8), scales[..., 0]


def decode(sent: Sequence[Tensor]) -> Tensor:
    """The numbers in float32."""
    if len(sent) == 1:
        return sent[0].float()
    codes, scales = sent
    numbers: Tensor = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (scales.shape[-1], -1))
    return (numbers * scales[..., None]).flatten(-2)


class _Summed(Function):
    """Rows of each process added up in few bits on the way; gradients come back in as few."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers, lengths: Sequence[int], kind: Format, block: int) -> Tensor:
        ctx.given = peers, lengths, kind, block
        mine = [lengths[peers.rank]] * len(peers)
        coming = [peers.exchange(part, lengths, mine, "outputs") for part in encode(x.float(), kind, block)]
        every = decode([one.wait() for one in coming])
        return every.view(len(peers), mine[0], -1).sum(0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        peers, lengths, kind, block = ctx.given
        every = [peers.all_gather(part, lengths, "outputs, back") for part in encode(dx.float(), kind, block)]
        return decode(every).to(dx.dtype), None, None, None, None


def summed_rows(x: Tensor, peers: Peers, lengths: Sequence[int], kind: Format, block: int = 128) -> Tensor:
    """Sum over the processes of this one's rows, of those of all in ``x [N, D]``: a reduce-scatter in few bits.

    Each process sends rows and, in ``float8``, scales for every ``block`` numbers of a row (all of it where D is no
    multiple); they are added in float32. Gradients are gathered likewise. The paper scales gradients by channel.
    """
    block = block if x.shape[1] % block == 0 else x.shape[1]
    found: Tensor = _Summed.apply(x, peers, lengths, kind, block)  # type: ignore[no-untyped-call]
    return found


class CompressedReduceScatter:
    """Sums over all processes, of which each gets its part.

    Attributes:
        kind: what is sent.
        gathered: what the sums are sent as where every process needs all (:meth:`all_reduce`).
    """

    def __init__(
        self, world: World, kind: Format = "bfloat16", gathered: Literal["float32", "bfloat16"] = "float32",
        block: int = 128,
    ) -> None:  # fmt: skip
        """For all processes of a world.

        Args:
            world: of processes.
            kind: of what is sent; ``float32`` does not compress.
            gathered: of the sums in :meth:`all_reduce`; ``bfloat16`` rounds them once more, and sends half.
            block: numbers that share a scale in ``float8``.

        Raises:
            UserError: no such format.
        """
        if kind not in FORMATS or gathered not in FORMATS[:2]:
            raise UserError(
                f"sums are sent as {', '.join(FORMATS)} and gathered as the first two, not {kind}/{gathered}"
            )
        self.peers = world.peers()
        self.kind, self.gathered, self.block = kind, gathered, block
        self._stream: Any = None

    def __call__(self, x: Tensor) -> Tensor:
        """The part of this process in the sum, ``[N / n]`` in float32.

        Args:
            x: ``[N]`` float32, the part of process 0 first; n divides N, and in ``float8`` n blocks do.

        Raises:
            UserError: N does not divide.
        """
        n = len(self.peers)
        if x.numel() % (n * (self.block if self.kind == "float8" else 1)):
            raise UserError(f"{x.numel()} numbers do not part into {n} of whole blocks: pad them with zeros")
        parts = encode(x.float().view(n, -1), self.kind, self.block)
        ones, name = [1] * n, f"reduce-scatter, {self.kind}"
        coming = [self.peers.exchange(part, ones, ones, name) for part in parts]
        return decode([one.wait() for one in coming]).sum(0)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum in every process, the same in all, float32 in the shape of ``x``; of any number of numbers."""
        n = len(self.peers)
        whole = torch.nn.functional.pad(x.flatten().float(), (0, -x.numel() % (n * self.block)))
        part = encode(self(whole), self.gathered)[0]
        every = self.peers.all_gather(part, [len(part)] * n, f"all-gather, {self.gathered}")
        return every.float()[: x.numel()].view(x.shape)

    def on_a_stream(self, buffer: Tensor) -> torch.futures.Future[Tensor]:
        """The mean over processes in place of ``buffer``, on a stream of its own where it is on a GPU."""
        if not buffer.is_cuda:
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(buffer.copy_(self.all_reduce(buffer) / len(self.peers)))
            return future
        if self._stream is None:
            self._stream = torch.cuda.Stream(buffer.device)
        self._stream.wait_stream(torch.cuda.current_stream(buffer.device))
        with torch.cuda.stream(self._stream):
            buffer.record_stream(self._stream)
            future = torch.futures.Future(devices=[buffer.device])
            future.set_result(buffer.copy_(self.all_reduce(buffer) / len(self.peers)))
        return future


def compressed_hook(state: CompressedReduceScatter, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Communication hook of DistributedDataParallel: the mean of gradients by :class:`CompressedReduceScatter`.

    On a GPU it runs beside the backward pass, on a CPU it is waited for. (DDP wants its annotations as classes.)
    """
    return state.on_a_stream(bucket.buffer())


def ring_sum(parts: Sequence[Tensor], kind: Format, block: int = 128) -> Tensor:
    """What a ring gives of ``parts``, each ``[N]`` float32, that rounds to ``kind`` at every hop: for comparison."""
    total = decode(encode(parts[0].float(), kind, block))
    for part in parts[1:]:
        total = decode(encode(total + decode(encode(part.float(), kind, block)), kind, block))
    return total
