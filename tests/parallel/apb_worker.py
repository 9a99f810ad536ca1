# SPDX-License-Identifier: Apache-2.0
"""What each process of the test of APB runs, and the reference."""

import torch

import tolerance
from manyheads.parallel.apb.hosts import Layer, SharedPrompt, in_turn

BATCH, HEADS, KV_HEADS, WIDTH, VALUES, LENGTH = 2, 4, 2, 6, 4, 61
CASES = (
    "hosts=4,query=5", "hosts=4,query=5,scorer=random,anchor=3,passed=2", "hosts=4,query=0,scorer=snapkv,passed=1.0",
    "hosts=4,query=5,scorer=hedge,asked=false,sinks=0", "hosts=4,query=3,passed=0,anchor=1.0", "hosts=4,query=100",
    "hosts=4,query=58,anchor=1,passed=1", "hosts=4,query=7,anchor=0,scorer=knorm,pooling=1",
    "hosts=4,query=7,scorer=distinct",
)  # fmt: skip


def policy(case, hosts):
    import manyheads

    return manyheads.parse(f"apb:{case.replace('hosts=4', f'hosts={hosts}')}")


def drawn(blocks, dtype=torch.float64, seed=0):
    """A layer of a prompt, with an anchor of its own keys and values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads, tokens, width):
        return torch.randn(BATCH, heads, tokens, width, dtype=torch.float64, generator=generator).to(dtype)

    anchor = len(blocks.anchor)
    sizes = ((HEADS, LENGTH, WIDTH), (KV_HEADS, LENGTH, WIDTH), (KV_HEADS, LENGTH, VALUES))
    front = (draw(KV_HEADS, anchor, WIDTH), draw(KV_HEADS, anchor, VALUES)) if anchor else None
    return Layer(*(draw(*size) for size in sizes), 0.5, front)


def shared(world, dtype=torch.float64):
    """By case: how far what processes have is from what one has, bytes that this one sends, and by the formula."""
    found = {}
    for case in CASES:
        apb = policy(case, world.size)
        blocks = apb.blocks(LENGTH)
        whole = drawn(blocks, dtype)
        want = in_turn(blocks, whole, apb.choose)
        world.ledger.clear()
        prompt = SharedPrompt(blocks, apb.choose, world.peers([range(world.size)]))
        q, k, v = (prompt.shard(x, 2) for x in (whole.q, whole.k, whole.v))
        got = prompt.attend(Layer(q, k, v, whole.scale, whole.anchor))
        sent, size = world.ledger.bytes(), torch.finfo(dtype).bits // 8
        wide = max(size, 4)
        formula = blocks.sent(
            world.rank, BATCH * KV_HEADS * (WIDTH + VALUES) * size, BATCH * HEADS * WIDTH * size,
            BATCH * HEADS * (VALUES + 1) * wide,
        )  # fmt: skip
        every = prompt.unshard(got, 1)
        assert torch.equal(every[:, prompt.rows], got)
        found[case] = tolerance.error(every, want), sent, formula
    return found


def wrong_order(world):
    """The control: blocks taken for those of other hosts."""
    apb = policy(CASES[0], world.size)
    blocks = apb.blocks(LENGTH)
    whole = drawn(blocks)
    prompt = SharedPrompt(blocks, lambda *given: apb.choose(*given).flip(-1) * 0, world.peers([range(world.size)]))
    q, k, v = (prompt.shard(x, 2) for x in (whole.q, whole.k, whole.v))
    got = prompt.unshard(prompt.attend(Layer(q, k, v, whole.scale, whole.anchor)), 1)
    return float((got - in_turn(blocks, whole, apb.choose)).abs().max())
