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
        prompt = SharedPrompt(blocks, apb.choose, world.peers())
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
    prompt = SharedPrompt(blocks, lambda *given: apb.choose(*given).flip(-1) * 0, world.peers())
    q, k, v = (prompt.shard(x, 2) for x in (whole.q, whole.k, whole.v))
    got = prompt.unshard(prompt.attend(Layer(q, k, v, whole.scale, whole.anchor)), 1)
    return float((got - in_turn(blocks, whole, apb.choose)).abs().max())


def model():
    """A small model and prompts for it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=50, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval(), torch.randint(1, 50, (2, 75))


def read(world, spec):
    """Logits of all tokens, and tokens that are written, by processes and by one process; and bytes sent of passing."""
    import manyheads

    llama, ids = model()
    found = []
    with torch.inference_mode():
        for mesh in (world, None):
            with manyheads.use(llama, spec.replace("hosts=4", f"hosts={world.size}"), mesh=mesh):
                world.ledger.clear()
                out = llama(ids)
                logits = out.logits if mesh is None else out.shared.unshard(out.logits, 1)
                passed = world.ledger.bytes("passing")
                made = llama.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
            found += [(logits, made[:, 75:], passed)]
    return found


def trained(world):
    """What happens where gradients are asked for."""
    import manyheads

    llama, ids = model()
    try:
        with manyheads.use(llama, "apb", mesh=world):
            llama(ids)
    except manyheads.errors.UserError as error:
        return str(error)
    return ""
