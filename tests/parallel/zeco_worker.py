# SPDX-License-Identifier: Apache-2.0
"""What processes run for the tests of zeco: linear attention they share, beside one process by the formula."""

import torch
import torch.distributed as dist

from manyheads.attention.recurrence import DecayState
from manyheads.parallel.zeco import ZeCO

BATCH, HEADS, KV_HEADS, WIDTH, VALUES, LENGTH = 2, 4, 2, 5, 3, 29
FORMS = (
    "plain", "head", "token", "documents", "sum", "mlstm", "hgrn", "channel", "channel documents", "delta",
    "gated delta",
)  # fmt: skip
WAYS = (
    {"exchange": "chain", "pieces": 1}, {"exchange": "chain", "pieces": 3}, {"exchange": "doubling"},
    {"exchange": "all_gather"}, {"exchange": "auto", "overlap": False},
)  # fmt: skip


def drawn(form):
    """Inputs of a form, float64: q, k, v, gates, rates, floor, weights of the loss, and what stands before all."""
    torch.manual_seed(FORMS.index(form))
    heads = HEADS if "channel" in form or "delta" in form else KV_HEADS
    width, values = (1, 1) if form == "hgrn" else (WIDTH, VALUES)
    q, k = (torch.randn(BATCH, h, LENGTH, width, dtype=torch.float64) for h in (HEADS, heads))
    if form in ("sum", "mlstm"):
        q, k = q.exp(), k.exp()
    v = torch.randn(BATCH, heads, LENGTH, values, dtype=torch.float64)
    g = beta = floor = None
    if "delta" in form:
        k, beta = torch.nn.functional.normalize(k, dim=-1), torch.rand(BATCH, heads, LENGTH, dtype=torch.float64)
    if form == "head":
        g = -torch.rand(heads, dtype=torch.float64)
    elif form not in ("plain", "delta"):
        g = -torch.rand(BATCH, heads, LENGTH, dtype=torch.float64)
    if "channel" in form:
        g = -torch.rand(BATCH, heads, LENGTH, WIDTH, dtype=torch.float64)
    if "documents" in form:
        for at in (4, 11, 12, 25):
            g[:, :, at] = -torch.inf
        g[0, :, 20] = -torch.inf  # rows have documents of their own
    if form == "mlstm":
        floor = 40 * torch.rand(BATCH, HEADS, LENGTH, dtype=torch.float64)
    start = torch.randn(BATCH, heads, width, values, dtype=torch.float64)
    sums = torch.rand(BATCH, heads, width, dtype=torch.float64)
    weights = torch.randn(BATCH, HEADS, LENGTH, values, dtype=torch.float64), torch.randn_like(start)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "floor": floor, "start": start, "sums": sums}, weights


def reference(form, q, k, v, g, beta, floor, start, sums, scale=0.7):
    """The recurrence as it is written, token by token: outputs and the last state."""
    groups = q.shape[1] // k.shape[1]
    state, total, outs = start, sums[..., None], []
    for t in range(q.shape[2]):
        if g is not None:
            gate = g[None, :, None] if g.ndim == 1 else g[:, :, t, None] if g.ndim == 3 else g[:, :, t]
            decay = gate.exp()[..., None]
            state, total = decay * state, decay * total
        key, value = k[:, :, t, :, None], v[:, :, t, None]
        if beta is not None:
            value = beta[:, :, t, None, None] * (value - key.mT @ state)
        state, total = state + key * value, total + key
        row = scale * q[:, :, t, None]
        out = row @ state.repeat_interleave(groups, 1)
        if form in ("sum", "mlstm"):
            below = row @ total.repeat_interleave(groups, 1)
            below = below if floor is None else torch.maximum(below.abs(), floor[:, :, t, None, None])
            out = out / (below + 1e-6)
        outs.append(out)
    return torch.cat(outs, 2), state


def gradients(form, given, weights):
    """Outputs, last state and all gradients of one process."""
    leaves = {name: x if x is None else x.clone().requires_grad_() for name, x in given.items()}
    out, state = reference(form, **leaves)
    ((out * weights[0]).sum() + (state * weights[1]).sum()).backward()
    return out.detach(), state.detach(), {name: x.grad for name, x in leaves.items() if x is not None}


def bounds(ranks, uneven=True):
    """Where shares end: of lengths that differ, one of them of none."""
    if not uneven:
        return [LENGTH * i // ranks for i in range(ranks + 1)]
    return {2: [0, 9, 29], 4: [0, 3, 17, 17, 29], 8: [0, 1, 1, 8, 12, 20, 21, 21, 29]}[ranks]


def relative(found, want):
    """The largest error over the largest number."""
    if not want.numel():
        return 0.0
    return float((found - want).abs().max() / want.abs().max().clamp_min(1e-9))


def part(x, name, at):
    """The tokens ``at`` of an input."""
    return x if x is None or (name == "g" and x.ndim == 1) or name in ("start", "sums") else x[:, :, at]


def shared(world, form, way, given, weights, at, wanted, damage=None):
    """The largest errors of this process: of outputs, of the last state, and of each gradient."""
    out, state, wanted = wanted
    parallel = ZeCO(**way).share_states(world)
    if damage is not None:
        damage(parallel)
    mine = {name: x if x is None else part(x, name, at).clone().requires_grad_() for name, x in given.items()}
    before = DecayState(mine["start"], mine["sums"] if form in ("sum", "mlstm") else None)
    if "delta" in form:
        y, after = parallel.delta(mine["q"], mine["k"], mine["v"], mine["beta"], mine["g"], scale=0.7, state=before)
    else:
        norm = form if form in ("sum", "mlstm") else None
        args = mine["q"], mine["k"], mine["v"], mine["g"]
        y, after = parallel.attend(*args, scale=0.7, norm=norm, floor=mine["floor"], state=before)
    loss = (y * weights[0][:, :, at]).sum()
    if world.rank == world.size - 1:
        loss = loss + (after.kv * weights[1]).sum()
    loss.backward()
    errors = {"out": relative(y.detach(), out[:, :, at]), "state": relative(parallel.last(after).kv, state)}
    for name, x in mine.items():
        if x is None or name not in wanted or wanted[name] is None:
            continue
        found = torch.zeros_like(x) if x.grad is None else x.grad
        if name == "g" and x.ndim == 1:
            dist.all_reduce(found)
        if name in ("start", "sums") and world.rank > 0:
            assert not found.any()
            continue
        errors[f"d{name}"] = relative(found, part(wanted[name], name, at))
    return errors


def exact(world):
    """By form and way: the largest error of this process."""
    found = {}
    ends = bounds(world.size)
    at = slice(ends[world.rank], ends[world.rank + 1])
    for form in FORMS if world.size < 8 else ("sum", "documents", "channel", "gated delta"):
        given, weights = drawn(form)
        wanted = gradients(form, given, weights)
        for way in WAYS if world.size < 8 else WAYS[1:4]:
            found[form, str(way)] = shared(world, form, way, given, weights, at, wanted)
    return found


def no_gate_gradient(parallel):
    """A scan that says nothing of how the factor on the state changes the loss."""
    state = parallel.scan.state
    parallel.scan.state = lambda m, s, meanwhile: state(m.detach(), s, meanwhile)


def wrong_rank(parallel):
    """A scan in which each process takes the state that is meant for the one before it."""
    begin = parallel.scan.begin
    rank = parallel.scan.peers.rank

    def off(m, s, reverse=False):
        wait = begin(m, s, reverse)

        def found():
            every = [torch.empty_like(s) for _ in parallel.scan.peers.ranks]
            dist.all_gather(every, wait().contiguous())
            return every[max(rank - 1, 0)]

        return found

    parallel.scan.begin = off


def controls(world):
    """Errors of two faults."""
    given, weights = drawn("token")
    ends = bounds(world.size, uneven=False)
    at = slice(ends[world.rank], ends[world.rank + 1])
    way = {"exchange": "chain", "pieces": 1}
    wanted = gradients("token", given, weights)
    return [
        shared(world, "token", way, given, weights, at, wanted, damage) for damage in (no_gate_gradient, wrong_rank)
    ]


def moved(world):
    """Outputs of equal and of shifted shares, and of twice and the sum of values: what the first process gathers."""
    given, _ = drawn("token")
    parallel = ZeCO().share_states(world)
    found = []
    for uneven in (False, True):
        ends = bounds(world.size, uneven)
        at = slice(ends[world.rank], ends[world.rank + 1])
        q, k, v, g = (given[name][:, :, at] for name in "qkvg")
        one, two = parallel.attend(q, k, v, g)[0], parallel.attend(q, k, v.exp(), g)[0]
        both = parallel.attend(q, k, 2 * v + v.exp(), g)[0]
        found.append((one, relative(2 * one + two, both)))
    return found


def refused(world):
    """What a model whose layers keep other states is answered."""
    from manyheads.errors import UserError
    from manyheads.models.decoder import Decoder, DecoderConfig

    parallel = ZeCO().share_states(world)
    try:
        parallel.states(Decoder("softmax", DecoderConfig(vocab=8, dim=8, layers=1, heads=2)), 1, 0)
    except UserError as error:
        return str(error)
    return ""


def minimax(types):
    """A MiniMax of transformers, with layers of these types."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=len(types), num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=2, block_size=8,
        layer_types=list(types), bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return MiniMaxForCausalLM(config).eval()


def transformers_model(world):
    """By what is asked of a MiniMax: this process's error beside the model itself in one process."""
    import manyheads

    ids = torch.randint(2, 97, (2, 37), generator=torch.Generator().manual_seed(0))
    padded = torch.ones_like(ids)
    padded[1, :9] = 0
    found = {}
    for name, types in (("hybrid", "LLFL"), ("linear alone", "LL")):
        model = minimax([{"L": "linear_attention", "F": "full_attention"}[x] for x in types])
        for case, mask in ((name, None), (f"{name}, padded", padded)):
            with torch.no_grad(), manyheads.use(model, "minimax_hybrid"):
                want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            with torch.no_grad(), manyheads.use(model, "zeco:pieces=2", mesh=world):
                out = model(input_ids=ids, attention_mask=mask, use_cache=False)
            keep = padded.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool)
            found[case] = relative(out.shared.unshard(out.logits, 1)[keep], want[keep])
            found[f"{case}, share"] = out.logits.shape[1] / ids.shape[1]
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        weight = next(m for m in model.modules() if type(m).__name__ == "MiniMaxLightningAttention").qkv_proj.weight
        wanted, weight.grad = weight.grad.clone(), None
        with manyheads.use(model, "zeco", mesh=world):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        dist.all_reduce(weight.grad)
        found[f"{name}, gradient"] = relative(weight.grad, wanted)
        with manyheads.use(model, "minimax_hybrid"):
            want = model.generate(ids, max_new_tokens=6, do_sample=False)
        with manyheads.use(model, "zeco", mesh=world):
            found[f"{name}, generated"] = float((model.generate(ids, max_new_tokens=6, do_sample=False) != want).sum())
    return found
