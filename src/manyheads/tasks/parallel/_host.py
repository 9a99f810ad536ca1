# SPDX-License-Identifier: Apache-2.0
"""One host of a prompt that several share, by itself, and what each of several sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...call import AttentionCall
from ...integrations import use
from ...parallel import ContextParallel, World, pattern
from ...parallel._peers import Arriving
from ...parallel.apb import APB, Blocks
from ...parallel.apb.hosts import Layer, SharedPrompt, among_processes
from ...strategy import AttentionCompute

__all__ = ["counted", "llama", "one_host", "together"]


class _Absent:
    """The other processes of a group: what they would send is zeros of the right size, at no cost."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self._size = rank, size

    def __len__(self) -> int:
        return self._size

    def all_gather(self, x: Tensor, lengths: Sequence[int], name: str) -> Tensor:
        """Zeros."""
        return x.new_zeros(sum(lengths), *x.shape[1:])

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int], name: str) -> Arriving:
        """Zeros."""
        zeros = parts[0].new_zeros(sum(lengths), *parts[0].shape[1:])
        return Arriving(zeros, zeros, ())


@dataclass(frozen=True, kw_only=True)
class _OneHost(AttentionCompute):
    """Computes what a host computes."""

    apb: APB
    blocks: Blocks
    host: int
    now: dict[str, Any] = field(default_factory=dict)

    def attend(self, call: AttentionCall) -> Tensor | None:
        if self.now["anchor"]:
            call.state["anchor"] = call.k, call.v
            return None
        peers: Any = _Absent(self.host, self.blocks.hosts)
        layer = Layer(call.q, call.k, call.v, call.scale, call.state.pop("anchor", None), call.rotary)
        return among_processes(self.blocks, layer, self.apb.choose, peers)


@contextmanager
def one_host(model: Any, apb: APB, ids: Tensor, host: int) -> Iterator[Callable[[], Tensor]]:
    """What computes a host's share of the prompt ``ids [1, n]``: anchor, block, and what is its part of the query."""
    blocks = apb.blocks(ids.shape[1])
    acting = _OneHost(apb=apb, blocks=blocks, host=host)
    stop = blocks.length if host == blocks.hosts - 1 else blocks.bounds[host][1]
    rows = torch.arange(blocks.bounds[host][0], stop, device=ids.device)[None]
    anchor = blocks.anchor.to(ids.device) if host else rows[0, :0]

    def read() -> Tensor:
        acting.now["anchor"] = True
        if len(anchor):
            model(ids[:, anchor], use_cache=False)
        acting.now["anchor"] = False
        hidden: Tensor = model(ids[:, rows[0]], position_ids=rows, use_cache=False).last_hidden_state
        return hidden

    with use(model, acting):
        yield read


def llama(layers: int, device: torch.device | str, longest: int, small: bool = False) -> Any:
    """A model of the shape of Llama-3-8B but for its layers and words, random, without a head; or a small one."""
    from transformers import LlamaConfig, LlamaModel

    sizes: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=512, max_position_embeddings=longest)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaModel(config)
    return model.to(torch.float32 if small else torch.bfloat16).eval()


def counted(world: World, specs: Sequence[tuple[str, str]], length: int, shape: tuple[int, int, int]) -> Any:
    """Bytes that this process sends to each other in one layer, of keys and values and in all, by arm.

    Args:
        world: processes.
        specs: names of arms and their specs; ``ring`` for a ring.
        length: tokens.
        shape: query heads, key/value heads and channels.
    """
    from ...spec import parse

    heads, kv_heads, width = shape
    generator, found = torch.Generator().manual_seed(0), {}

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, width, generator=generator).to(torch.bfloat16)

    for name, spec in specs:
        if spec == "ring":
            context = ContextParallel(world, pattern("causal", length), "contiguous", "ring")
            q, k, v = (context.shard(draw(h, length), 2) for h in (heads, kv_heads, kv_heads))
            world.ledger.clear()
            context.attend(q, k, v)
        else:
            apb: Any = parse(spec)
            blocks = apb.blocks(length, world.size)
            prompt = SharedPrompt(blocks, apb.choose, world.peers())
            q, k, v = (prompt.shard(draw(h, length), 2) for h in (heads, kv_heads, kv_heads))
            anchor = len(prompt.front)
            front = (draw(kv_heads, anchor), draw(kv_heads, anchor)) if anchor else None
            world.ledger.clear()
            prompt.attend(Layer(q, k, v, width**-0.5, front))
        passed, everything = [0] * world.size, [0] * world.size
        for (what, to), size in world.ledger.sent.items():
            everything[to] += size
            passed[to] += size * (what not in ("query", "merge"))
        found[name] = passed, everything
    return found


def together(world: World, spec: str, layers: int, length: int, rounds: int) -> list[float]:
    """Seconds of prefill by all processes, or by this one alone where the spec is empty; on CPUs of a small model."""
    from ...costs.clock import Clock

    gpu = torch.distributed.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    model, clock = llama(layers, device, length, small=not gpu), Clock(device)
    ids = torch.randint(512, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    times = []
    with torch.inference_mode(), use(model, *([spec] if spec else []), **({"mesh": world} if spec else {})):
        for turn in range(rounds + 2):
            torch.distributed.barrier()
            spent = clock.seconds(lambda: model(ids, use_cache=False))
            if turn > 1:
                times.append(spent)
    return times
