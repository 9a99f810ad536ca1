# SPDX-License-Identifier: Apache-2.0
"""Runs experts that 2, 4 and 8 processes share, and leaves errors and bytes as JSON for the test."""

import json
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import manyheads
from manyheads.errors import UserError
from manyheads.parallel import CompressedReduceScatter, World, compressed_hook, sum_gradients
from manyheads.parallel._compressed import FORMATS, decode, encode
from manyheads.parallel._experts import DISPATCHES, ExpertParallel, feed_forward
from manyheads.parallel._moe_block import HELD, MoeBlock, MoeConfig, held_numbers
from manyheads.parallel._remat import saved_bytes
from manyheads.parallel._travel import gather, reduce_scatter
from manyheads.tasks.parallel._held import Held
from parallel.forked import start

SIZES = (2, 4, 8)

EXPERTS, DIM, INNER, TOKENS = 8, 6, 5, 11  # TOKENS of the first process, one more of each that follows


def dense(x, index, weight, gate_up, down):
    """The mixture by its formula, an expert after the other on all tokens: weights behind the last matrix."""
    out = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        gate, up = F.linear(x, gate_up[expert]).chunk(2, -1)
        share = (weight * (index == expert)).sum(1)
        out = out + share[:, None] * F.linear(F.silu(gate) * up, down[expert])
    return out


def drawn(ranks, top_k, experts=EXPERTS, choice="mixed", seed=0):
    """Tokens of all processes with their choices, weights of experts, and what is sent back; lengths of processes."""
    draws = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draws, dtype=torch.float64)
    lengths = [TOKENS + rank for rank in range(ranks)]
    total = sum(lengths)
    index = torch.rand(total, experts, generator=draws).topk(top_k).indices
    if choice == "all to one":
        index = torch.zeros(total, 1, dtype=torch.long)
    if choice == "none of the last":
        index = torch.rand(total, experts - experts // ranks, generator=draws).topk(top_k).indices
    weight = torch.rand(index.shape, generator=draws, dtype=torch.float64)
    given = [normal(total, DIM), weight, normal(experts, 2 * INNER, DIM), normal(experts, DIM, INNER)]
    return given, index, normal(total, DIM), lengths


def error(got, want):
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max()) / float(want.abs().max())


def off(got, want):
    """Relative RMS error."""
    return float((got - want).detach().norm() / want.detach().norm())


def alike(world, dispatch, top_k, experts=EXPERTS, choice="mixed", wrong=None):
    """Largest relative error of outputs and gradients against the formula over all tokens, over all processes."""
    (x, weight, gate_up, down), index, dout, lengths = drawn(world.size, top_k, experts, choice)
    every = [t.clone().requires_grad_() for t in (x, weight, gate_up, down)]
    want = dense(every[0], index, *every[1:])
    wanted = torch.autograd.grad(want, every, dout)
    shared = ExpertParallel(world, experts, index.shape[1], dispatch)
    start = sum(lengths[: world.rank])
    tokens = slice(start, start + lengths[world.rank])
    mine = [x[tokens], weight[tokens], gate_up[shared.mine], down[shared.mine]]
    mine = [t.clone().requires_grad_() for t in mine]
    compute = feed_forward(*mine[2:])
    if wrong == "unweighted":
        compute = lambda rows: feed_forward(*mine[2:])(rows._replace(weight=rows.weight * 0 + 1))  # noqa: E731
    if wrong == "shifted":  # each row by the expert after its own
        compute = lambda rows: feed_forward(*mine[2:])(rows._replace(counts=rows.counts[1:] + rows.counts[:1]))  # noqa: E731
    out = shared(mine[0], index[tokens], mine[1], compute)
    got = (out, *torch.autograd.grad(out, mine, dout[tokens]))
    parts = (want[tokens], wanted[0][tokens], wanted[1][tokens], wanted[2][shared.mine], wanted[3][shared.mine])
    found = torch.tensor(
        [error(a, b) if b.abs().max() else float(a.abs().max()) for a, b in zip(got, parts, strict=True)]
    )
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def in_few_bits(world, kind):
    """Relative errors of output and gradients of tokens where sums travel as ``kind``, and bytes of them both ways."""
    (x, weight, gate_up, down), index, dout, lengths = drawn(world.size, 2)
    start = sum(lengths[: world.rank])
    tokens = slice(start, start + lengths[world.rank])
    made = []
    for sums in (None, kind):
        shared = ExpertParallel(world, EXPERTS, 2, "all_gather", sums)
        mine = x[tokens].float().requires_grad_()
        compute = feed_forward(gate_up[shared.mine].float(), down[shared.mine].float())
        world.ledger.clear()
        out = shared(mine, index[tokens], weight[tokens].float(), compute)
        made.append((out, *torch.autograd.grad(out, mine, dout[tokens].float())))
    sent = [world.ledger.bytes("outputs"), world.ledger.bytes("outputs, back")]
    return {"errors": [off(got, want) for got, want in zip(made[1], made[0], strict=True)], "sent": sent}


def counted(world, act):
    """Bytes that this process sent by name, in ``act()``."""
    world.ledger.clear()
    act()
    found = {}
    for (name, _), size in world.ledger.sent.items():
        found[name] = found.get(name, 0) + size
    return found


def dispatched(world, top_k, experts, tokens=512, seed=3):
    """Bytes by dispatch and name of float32 tokens, forward and back, and by what the choices say they have to be."""
    draws = torch.Generator().manual_seed(seed)
    index = torch.rand(world.size, tokens, experts, generator=draws).topk(top_k).indices
    owner = index * world.size // experts
    mine = owner[world.rank]
    away = int((mine != world.rank).sum())
    ranks = torch.zeros(tokens, world.size).scatter_(1, mine, 1.0)
    ranks[:, world.rank] = 0
    found = {"rows": {"all_to_all": away, "dedupe": int(ranks.sum()), "all_gather": tokens * (world.size - 1)}}
    came = {"all_to_all": int((owner == world.rank).sum()) - int((mine == world.rank).sum())}
    came["dedupe"] = int((owner == world.rank).any(2).sum()) - int((mine == world.rank).any(1).sum())
    found["back"] = {**came, "all_gather": tokens * (world.size - 1)}
    for dispatch in DISPATCHES:
        shared = ExpertParallel(world, experts, top_k, dispatch)
        x = torch.randn(tokens, DIM, requires_grad=True)
        weight = torch.rand(tokens, top_k)

        def act(shared=shared, x=x, weight=weight):
            out = shared(x, index[world.rank], weight, lambda rows: rows.x * rows.weight[:, None])
            out.sum().backward()

        found[dispatch] = counted(world, act)
    return found


def attention_bytes(world):
    """Bytes sent forward for attention with split weights, and by heads."""
    tokens, heads, kv_heads, width = 8, 16, 8, 4
    lengths = [tokens] * world.size
    block = block_of(world, "all", heads=heads, kv_heads=kv_heads, dim=heads * width)
    x = torch.randn(tokens, heads * width)

    def split():
        reduce_scatter(gather(x, block.peers, lengths, "in"), block.peers, lengths, "out")

    return {
        "split": sum(counted(world, split).values()),
        "heads": counted(world, lambda: block(x[None], lengths))["heads"],
    }


def block_of(world, held, dispatch="all_to_all", dim=32, heads=16, kv_heads=8, top_k=2, inner=24):
    torch.manual_seed(7)
    return MoeBlock(MoeConfig(dim, heads, kv_heads, EXPERTS, top_k, inner), world, dispatch, held)


def blocks(world, dispatch):
    """Two blocks by what they hold: whether outputs and gradients are bit for bit the same, and bytes of the first."""
    lengths = [12 + rank for rank in range(world.size)]
    found, first = {}, None
    for held in HELD:
        one, two = block_of(world, held, dispatch), block_of(world, held, dispatch)
        torch.manual_seed(world.rank)
        hidden = torch.randn(2, lengths[world.rank], 32, requires_grad=True)
        out = two(one(hidden, lengths), lengths)
        (out * torch.arange(32)).sum().backward()
        made = [out, hidden.grad, *(p.grad for p in one.parameters()), *(p.grad for p in two.parameters())]
        first = first or made
        rows = []
        send = one.shared.send

        def watched(*given, send=send, rows=rows):
            route = send(*given)

            def arrive():
                found = route.arrive()
                rows.append(len(found.x))
                return found

            return route._replace(arrive=arrive)

        one.shared.send = watched
        size, indices = saved_bytes(lambda one=one, x=hidden: one(x, lengths), tuple(one.parameters()))
        with Held(hidden, *one.parameters()) as there:
            alive = one(hidden, lengths)
        equal = [torch.equal(a, b) for a, b in zip(made, first, strict=True)]
        found[held] = {"equal": all(equal), "moved": bool(first[1].abs().sum()), "bytes": size, "wanted": -1}
        beside = hidden.nbytes - indices - (alive.nbytes if held == "all" else 0)
        for _ in range(100):  # the backend's threads let go of what they sent a little later
            found[held]["alive"] = there.nbytes + beside
            if found[held]["alive"] - size < 64:
                break
            time.sleep(0.02)
        if held != "all":
            found[held]["wanted"] = formula(one, held, hidden, sum(lengths), rows[0], world.size)
    return found


def formula(block, held, hidden, total, rows, ranks):
    """Bytes that a block holds: attention's part is of its heads for all tokens, the experts' of the rows they have."""
    c, (batch, tokens, _) = block.config, hidden.shape
    own, heads = batch * tokens, batch * total * c.heads / ranks
    numbers = 4 * own * c.dim + heads * c.dim / c.heads  # input, first norm or queries, second norm, output; attention
    if held == "products":
        numbers += 2 * own * c.dim * c.kv_heads / c.heads + 2 * rows * c.inner
    mean = held_numbers(c, held)  # where all processes have as many tokens and rows
    even = 4 * c.dim + (2 * c.dim * c.kv_heads / c.heads + 2 * c.top_k * c.inner if held == "products" else 0)
    assert mean == even
    return 4 * (numbers + heads)  # and a log-sum-exp for each head of a token


def summed(world):
    """Sums of gradients by format: error against float64, bytes, and whether they are what one process computes."""
    size = 256 * world.size
    draws = [torch.Generator().manual_seed(rank) for rank in range(world.size)]
    scale = torch.randn(size, generator=torch.Generator().manual_seed(99)).exp()
    every = torch.stack([torch.randn(size, generator=g) * scale for g in draws])
    part = slice(world.rank * 256, (world.rank + 1) * 256)
    exact, found = every.double().sum(0)[part], {}
    for kind in FORMATS:
        reduce = CompressedReduceScatter(world, kind)
        world.ledger.clear()
        got = reduce(every[world.rank])
        simulated = decode(encode(every, kind)).sum(0)[part]
        found[kind] = {
            "error": off(got.double(), exact), "bytes": world.ledger.bytes(), "same": torch.equal(got, simulated),
            "all": off(reduce.all_reduce(every[world.rank][:-3]).double(), every.double().sum(0)[:-3]),
        }  # fmt: skip
    world.ledger.clear()
    plain = reduce.peers.reduce_scatter(every[world.rank].contiguous(), [256] * world.size, "plain")
    found["plain"] = {"error": off(plain.double(), exact), "bytes": world.ledger.bytes()}
    return found


def hooked(world):
    """Gradients of a model whose processes see other data, by the hook: error against the mean of all, and bytes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 16), nn.GELU(), nn.Linear(16, 7))
    alone = [torch.zeros_like(p) for p in model.parameters()]
    inputs = [torch.randn(5, 9) for _ in range(world.size)]
    for x in inputs:
        for total, g in zip(alone, torch.autograd.grad(model(x).square().sum(), list(model.parameters())), strict=True):
            total += g / world.size
    shared = nn.parallel.DistributedDataParallel(model)
    shared.register_comm_hook(CompressedReduceScatter(world, "bfloat16"), compressed_hook)
    world.ledger.clear()
    shared(inputs[world.rank]).square().sum().backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    every = [torch.empty_like(got) for _ in range(world.size)]
    dist.all_gather(every, got)
    sent = {name: world.ledger.bytes(name) for name in sorted({name for name, _ in world.ledger.sent})}
    return {
        "error": error(got, torch.cat([g.flatten() for g in alone])), "same": all(torch.equal(got, x) for x in every),
        "numbers": got.numel(), "bytes": sent,
    }  # fmt: skip


def overlapped(world):
    """What has left when that which needs no tokens is computed, and when its gradient is; and what comes out."""
    (x, weight, gate_up, down), index, dout, lengths = drawn(world.size, 2)
    start = sum(lengths[: world.rank])
    tokens = slice(start, start + lengths[world.rank])
    x, beside = x[tokens].clone().requires_grad_(), torch.randn(DIM, DIM, dtype=torch.float64)
    found = {}
    for dispatch in ("all_to_all", "dedupe"):
        shared = ExpertParallel(world, EXPERTS, 2, dispatch)
        compute = feed_forward(gate_up[shared.mine], down[shared.mine])
        seen = []

        def meanwhile(seen=seen):
            seen.append({name for name, _ in world.ledger.sent})
            out = x @ beside
            out.register_hook(lambda _: seen.append({name for name, _ in world.ledger.sent}))
            return out

        world.ledger.clear()
        out = shared(x, index[tokens], weight[tokens], compute, meanwhile)
        out.backward(dout[tokens])
        plain = shared(x.detach(), index[tokens], weight[tokens], compute) + x.detach() @ beside
        found[dispatch] = {"seen": [sorted(names) for names in seen], "error": error(out, plain)}
    return found


def mixtral(**changes):
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    chosen = {"num_local_experts": EXPERTS, "num_experts_per_tok": 2, **changes}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **chosen, max_position_embeddings=64)).double().eval()
    model.set_experts_implementation("eager")  # the others have no float64
    return model


def in_a_model(world, spec, ids, **given):
    """A MixtralForCausalLM as it is, against itself in one process: errors, and what stays afterwards."""
    alone, model = mixtral(), mixtral()
    want = alone(input_ids=ids, labels=ids, **given)
    want.loss.backward()
    kinds, before = [type(m) for m in model.modules()], world.ledger.bytes("tokens")
    with manyheads.use(model, spec, mesh=world):
        out = model(input_ids=ids, labels=ids, **given)
        out.loss.backward()
    sent = world.ledger.bytes("tokens") - before
    first = [EXPERTS * rank // world.size for rank in range(world.size + 1)]
    one = model.model.layers[0].mlp.experts.gate_up_proj.grad
    others = one[: first[world.rank]].abs().sum() + one[first[world.rank + 1] :].abs().sum()
    names, own = dict(alone.named_parameters()), {n: p.grad.clone() for n, p in model.named_parameters()}
    sum_gradients(model, world)
    return {
        "logits": error(out.logits, want.logits[:, out.shared.rows]), "loss": error(out.loss[None], want.loss[None]),
        "gradients": max(error(p.grad, names[n].grad) for n, p in model.named_parameters()),
        "unsummed": min(error(own[n], names[n].grad) for n in own), "others": float(others), "sent": sent,
        "restored": kinds == [type(m) for m in model.modules()],
        "after": error(model(input_ids=ids).logits, alone(input_ids=ids).logits),
    }  # fmt: skip


def models(world):
    ids = torch.randint(64, (2, 19), generator=torch.Generator().manual_seed(1))
    found = {d: in_a_model(world, f"megascale_moe:dispatch={d}", ids) for d in ("auto", *DISPATCHES[1:])}
    if world.size == 2:
        model = mixtral()
        want = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        with manyheads.use(model, "megascale_moe", mesh=world):
            got = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        found["generated"] = torch.equal(got, want)
    if world.size == 8:
        found["refused"] = [refused(world, mixtral(num_local_experts=4)), refused(world, "llama")]
    return found


def refused(world, model):
    """The line of a UserError."""
    if model == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 64}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8))
    try:
        with manyheads.use(model, "megascale_moe", mesh=world):
            model(input_ids=torch.arange(16)[None])
    except UserError as told:
        return str(told)
    return ""


def cases(ranks):
    """Choices that are compared with the formula, for so many processes: ``top_k``, experts, how they are chosen."""
    found = {"k=2": (2, EXPERTS, "mixed"), "none of the last": (1, EXPERTS, "none of the last")}
    if ranks == 4:
        found |= {"k=1": (1, EXPERTS, "mixed"), "all": (EXPERTS, EXPERTS, "mixed"), "11 experts": (3, 11, "mixed")}
        found |= {"all to one": (1, EXPERTS, "all to one")}
    return found


def run(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{ranks}", rank=rank, world_size=ranks)
    world, found = World(), {"errors": {}}
    for dispatch in DISPATCHES:
        for name, case in cases(ranks).items():
            found["errors"][f"{dispatch}, {name}"] = alike(world, dispatch, *case)
    found |= {"attention": attention_bytes(world), "sums": summed(world), "models": models(world)}
    if ranks == 4:
        found |= {wrong: alike(world, "dedupe", 2, 2 * EXPERTS, wrong=wrong) for wrong in ("unweighted", "shifted")}
        found["blocks"] = {dispatch: blocks(world, dispatch) for dispatch in DISPATCHES}
        found |= {"hook": hooked(world), "overlap": overlapped(world)}
        found["few bits"] = {kind: in_few_bits(world, kind) for kind in FORMATS}
    if ranks > 2:
        found["sent"] = {k: dispatched(world, k, 2 * EXPERTS) for k in (1, 4)}
    Path(folder, f"{ranks}-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    mixtral()  # so that it is imported once
    start(run, SIZES)
