# SPDX-License-Identifier: Apache-2.0
"""Attention gates: the gate and the attention under it from their formulas, what they become at the edges, training."""

import dataclasses
import json
import math

import pytest
import torch

import manyheads
from manyheads import UserError, parse
from manyheads.caches.attention_gate import Gates
from manyheads.caches.attention_gate.gates import Gate
from manyheads.caches.attention_gate.soft import SoftGates, eviction_loss
from manyheads.caches.attention_gate.store import GateStore
from manyheads.integrations.transformers import find_sites, load_cache, new_cache, prefill, save_cache
from manyheads.recipes._adapters import encoded, id_batches
from manyheads.recipes.attention_gate import calibrate, main, train_gates
from manyheads.training import Checkpoint
from oracles import models
from oracles.caches import prefilled, step, stores
from oracles.strategies import DrawnGates
from tolerance import FORMULA, SAME, assert_close, error

STEP = DrawnGates(schedule="step")


@pytest.fixture(scope="module")
def llama():
    return models.tiny("llama", torch.float64)


def gates_of(model, **settings):
    return Gates.of(model.config.hidden_size, [site for site, _ in find_sites(model)], **settings)


def constant(folder, bias, model, **settings):
    """Gates whose every logit is ``bias``."""
    gates = gates_of(model, **settings)
    for layer in gates.kv_heads:
        torch.nn.init.zeros_(gates.gate(layer).out.weight)
        torch.nn.init.constant_(gates.gate(layer).out.bias, bias)
    return f"attention_gate:gates={gates.save(folder)}"


def logits(model, ids, *strategies, **extra):
    with manyheads.use(model, *strategies), torch.no_grad():
        return model(ids, use_cache=bool(strategies), **extra).logits


def gate_by_hand(gate, x):
    """Logits ``[Hkv][T]`` in loops over tokens and heads, float64: ``x [T, D]``."""
    width, weights = gate.num_heads * gate.head_dim, gate.qkv.weight.double()
    made = []
    for t in range(len(x)):
        heads = []
        for h in range(gate.num_heads):
            rows = [
                slice(part * width + h * gate.head_dim, part * width + (h + 1) * gate.head_dim) for part in range(3)
            ]
            q = weights[rows[0]] @ x[t]
            scores = torch.stack([q @ (weights[rows[1]] @ x[s]) / math.sqrt(gate.head_dim) for s in range(t + 1)])
            values = torch.stack([weights[rows[2]] @ x[s] for s in range(t + 1)])
            heads.append(scores.softmax(0) @ values + values[t])
        made.append(gate.out.weight.double() @ torch.cat(heads) + gate.out.bias.double())
    return torch.stack(made, 1)


def drawn(dim=12, kv_heads=3):
    torch.manual_seed(3)
    gate = Gate(dim, kv_heads, num_heads=2, head_dim=4).double()
    torch.nn.init.normal_(gate.out.weight)
    return gate, torch.randn(2, 9, dim, dtype=torch.float64)


def test_gate_against_loops():
    gate, x = drawn()
    want = torch.stack([gate_by_hand(gate, row) for row in x])
    assert_close(gate(x), want, FORMULA)
    assert error(gate(x.flip(1)).flip(2), want) > 0.1  # one that looks the other way


def test_gate_over_parts_and_padding():
    """New tokens over the keys of earlier ones give what one pass gives; padding in front changes nothing."""
    gate, x = drawn()
    q, k, v = gate.project(x)
    parts = [gate.decide(q[:, :, a:b], k[:, :, :b], v[:, :, :b]) for a, b in ((0, 4), (4, 8), (8, 9))]
    assert_close(torch.cat(parts, 2), gate(x), FORMULA)
    real = torch.tensor([[False] * 3 + [True] * 6] * 2)
    assert_close(gate(x, real)[..., 3:], gate(x[:, 3:]), FORMULA)
    assert error(gate(x)[..., 3:], gate(x[:, 3:])) > 1e-3


def run_by_hand(policy, model, ids):
    """One row in one layer of attention: flags from the gate, then attention in loops, from the model's own q, k, v."""
    seen = {}

    class Look(manyheads.strategy.AttentionWatch):
        def watch(self, call, out):
            seen[call.site.layer] = call, out

    with manyheads.use(model, Look()), torch.no_grad():
        model(ids, use_cache=False)
    call, _ = seen[0]
    gate = policy.store(call.site).policy.trained.gate(0).double()
    flags = gate_by_hand(gate, call.hidden[0]).sigmoid() > 0.5
    q, k, v = call.q[0], call.k[0], call.v[0]
    groups = q.shape[0] // k.shape[0]
    out = torch.zeros(q.shape[1], q.shape[0], v.shape[-1], dtype=torch.float64)
    for i in range(q.shape[1]):
        for h in range(q.shape[0]):
            sees = [j for j in range(i + 1) if flags[h // groups, j] or j == i]
            weights = torch.stack([q[h, i] @ k[h // groups, j] * call.scale for j in sees]).softmax(0)
            out[i, h] = weights @ v[h // groups, sees]
    return flags, out


class Output(manyheads.strategy.AttentionWatch):
    def watch(self, call, out):
        call.state["out"] = out


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_attention_against_loops(heads):
    """What the first layer gives, and which tokens it holds."""
    model, ids = models.build("llama", dtype=torch.float64, num_key_value_heads=heads), models.tokens(1, 20)
    flags, want = run_by_hand(STEP, model, ids)
    assert 0.1 < flags.double().mean() < 0.9
    look = Output()
    with manyheads.use(model, look, STEP) as port:
        cache = new_cache(model, STEP)
        step(model, ids, cache)
        got = next(iter(port.state(look).values()))["out"]
    assert_close(got[0], want, FORMULA)
    held = [[p for p in head if p >= 0] for head in stores(cache)[0].live.positions()[0].tolist()]
    assert held == [row.nonzero()[:, 0].tolist() for row in flags]


def test_kept_by_everyone_is_the_model(llama, tmp_path):
    """Gates that keep all: bit-equal. That keep nothing: each token sees itself alone. In between: neither."""
    ids = models.tokens(2, 15)
    want = logits(llama, ids)
    assert torch.equal(logits(llama, ids, constant(tmp_path / "all", 40.0, llama)), want)
    nothing = logits(llama, ids, constant(tmp_path / "none", -40.0, llama))
    alone = torch.cat([logits(llama, ids[:, t : t + 1], position_ids=torch.tensor([[t]])) for t in range(15)], 1)
    assert_close(nothing, alone)
    assert error(logits(llama, ids, DrawnGates()), want) > 1e-2 and error(nothing, want) > 1e-2


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (1,) * 20, (9, 1, 1, 4, 1, 1, 3)])
def test_in_parts_as_at_once(llama, sizes):
    """Every token gated: a text in any parts, decoding in ragged storage included, gives what one pass gives."""
    ids = models.tokens(2, 20)
    with manyheads.use(llama):
        whole, parts = new_cache(llama, STEP), new_cache(llama, STEP)
        want = step(llama, ids, whole)
        got = torch.cat([step(llama, piece, parts) for piece in ids.split(sizes, 1)], 1)
        assert_close(got, want)
        for a, b in zip(stores(whole), stores(parts), strict=True):
            assert a.live.positions().sort(-1).values.tolist() == b.live.positions().sort(-1).values.tolist()
        other = prefilled(llama, DrawnGates(), ids[:, :7])
        step(llama, ids[:, 7:13], other)
        assert error(step(llama, ids[:, 13:], other), want[:, 13:]) > 1e-3  # gates of the prompt alone


def test_a_prompt_in_chunks_is_freed_on_the_way(llama):
    """``prefill`` in chunks holds what one forward keeps, and never the whole prompt."""
    ids, policy, most = models.tokens(1, 41), DrawnGates(), []
    with manyheads.use(llama):
        whole, parts = prefilled(llama, policy, ids[:, :40]), new_cache(llama, policy)
        prefill(llama, ids, parts, chunk=8, progress=lambda _: most.append(stores(parts)[0].keys.shape[2]))
        assert most[-1] == max(most) == stores(whole)[0].keys.shape[2] < 40
        assert_close(step(llama, ids[:, 40:], parts), step(llama, ids[:, 40:], whole))
        assert not stores(parts)[0].state and stores(prefilled(llama, STEP, ids))[0].state  # the gate's own keys


def test_later_tokens_change_no_decision(llama):
    """Causality: what stands behind a token moves neither its flag nor any output before it."""
    a, b = models.tokens(1, 24, seed=1), models.tokens(1, 24, seed=2)
    b[:, :14] = a[:, :14]
    with manyheads.use(llama):
        caches, outs = zip(*((c := new_cache(llama, STEP), step(llama, ids, c)) for ids in (a, b)), strict=True)
    assert torch.equal(outs[0][:, :14], outs[1][:, :14])
    for one, two in zip(*map(stores, caches), strict=True):
        early = [
            [sorted(p for p in h if 0 <= p < 14) for h in s.live.positions()[0].tolist()] for s in (one, two)
        ]  # fmt: skip
        assert early[0] == early[1]
    with manyheads.use(llama):  # a score of the whole prompt, as others have, does look ahead
        norm = [prefilled(llama, "snapkv:budget=8,window_size=2,kernel_size=1", ids) for ids in (a, b)]
    early = [[p for p in stores(c)[0].live.positions()[0, 0].tolist() if p < 14] for c in norm]
    assert early[0] != early[1]


def test_bytes_are_those_of_what_is_kept(llama):
    """Ragged storage holds the flagged tokens and its room, the same as the count of flags says, heads unequal."""
    ids = models.tokens(1, 200)
    with manyheads.use(llama):
        cache, full = prefilled(llama, DrawnGates(), ids), prefilled(llama, "full", ids)
        kept = sum(int(s.tokens.ragged.lengths.sum()) for s in stores(cache))
        numbers, slots = 2 * llama.config.head_dim * 8 + 4, kept + 16 * 2 * 2  # and an index; 16 places a head
        assert len({int(n) for s in stores(cache) for n in s.tokens.ragged.lengths.flatten()}) > 1
        assert abs(cache.bytes() - slots * numbers) <= 0.02 * cache.bytes()
        assert cache.bytes() < 0.75 * full.bytes()

        class Hides(GateStore):
            """Wrong: masks and frees nothing."""

            def evict(self, call):
                self._forwards += 1
                self._kept = None

        hiding = new_cache(llama, DrawnGates())
        for layer in hiding.layers:
            layer.store = Hides(dataclasses.replace(layer.store.policy), layer.site)
        step(llama, ids, hiding)
        assert hiding.bytes() > 1.3 * cache.bytes()


def test_dropped_tokens_can_be_taken_out(llama):
    """Decoding over what is held equals masked attention over everything, whose dropped keys are poisoned."""
    ids, last = models.tokens(1, 30), models.tokens(1, 1, seed=7)
    with manyheads.use(llama):
        cache = prefilled(llama, DrawnGates(), ids)
        kept = [s.live.positions()[0].tolist() for s in stores(cache)]
        want = step(llama, last, cache)

        class Mask(manyheads.strategy.AttentionEdit):
            def edit(self, call):
                alive = torch.zeros(1, 2, call.q.shape[2], call.k.shape[2], dtype=torch.bool)
                for h, head in enumerate(kept[call.site.layer]):
                    alive[:, h, :, [p for p in head if p >= 0] + [30]] = True
                return call.replace(mask=alive.repeat_interleave(2, 1), is_causal=False)

        plain = new_cache(llama, parse("full"))
        gated = prefilled(llama, DrawnGates(), ids)
        step(llama, ids, plain)
        for layer, own in zip(stores(plain), stores(gated), strict=True):  # keys as the gated prompt made them
            positions = own.live.positions()
            layer.padded.keys[...], layer.padded.values[...] = 1e4, 1e4
            for h in range(2):
                for slot, p in enumerate(positions[0, h].tolist()):
                    if p >= 0:
                        layer.padded.keys[0, h, p] = own.live.keys[0, h, slot]
                        layer.padded.values[0, h, p] = own.live.values[0, h, slot]
    with manyheads.use(llama, Mask()):
        assert_close(step(llama, last, plain), want)


def test_saved_gates_are_the_same_gates(llama, tmp_path):
    gates = gates_of(llama, num_heads=1, head_dim=4, threshold=0.4, about={"target": 0.5})
    again = Gates.load(gates.save(tmp_path / "gates"))
    assert again.threshold == 0.4 and again.about == {"target": 0.5} and again.kv_heads == gates.kv_heads
    mine, theirs = gates.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert not any(p.requires_grad for p in again.parameters())
    strategy = parse(f"attention_gate:gates={tmp_path / 'gates'},schedule=step")
    assert parse(strategy.spec) == strategy and strategy.limit == 0.4
    assert parse(f"{strategy.spec},threshold=0.9").limit == 0.9
    ids = models.tokens(1, 20)
    with manyheads.use(llama):
        assert torch.equal(step(llama, ids, new_cache(llama, strategy)), step(llama, ids, new_cache(llama, strategy)))
        cache = prefilled(llama, strategy, ids)
        step(llama, ids[:, :1], cache)
        save_cache(cache, tmp_path / "cache.safetensors")
        back = load_cache(tmp_path / "cache.safetensors", llama)
        assert torch.equal(step(llama, ids, back), step(llama, ids, cache))  # the gate's own keys, too
    config = json.loads((tmp_path / "gates" / "gates.json").read_text())
    (tmp_path / "gates" / "gates.json").write_text(json.dumps(config | {"head_dim": 8}))
    with pytest.raises(UserError, match=r"holds no gates .*; train some: python -m"):
        Gates.load(tmp_path / "gates")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("attention_gate", "needs gates=FOLDER, trained on the model: python -m manyheads.recipes.attention_gate"),
        ("attention_gate:gates=x,budget=0.5", "train them for another target"),
        ("attention_gate:gates=x,recent=4", "train them for another target"),
        ("attention_gate:gates=x,schedule=3", "schedule is prefill, chunk or step"),
        ("attention_gate:gates=x,threshold=1", "keeps nothing"),
    ],
)
def test_refusals(spec, said):
    with pytest.raises(UserError, match=said) as found:
        parse(spec)
    assert "\n" not in str(found.value)


def test_gates_of_another_model_are_refused(llama, tmp_path):
    with pytest.raises(UserError, match=r"nowhere holds no gates .*; train some: python -m"), manyheads.use(llama):
        new_cache(llama, parse("attention_gate:gates=nowhere"))
    other = models.build("llama", num_key_value_heads=4)
    spec = constant(tmp_path, 1.0, other)
    with pytest.raises(UserError, match="no gate for layer 0 with 2 key/value heads: train gates"):
        logits(llama, models.tokens(1, 4), spec)
    wide = models.build("llama", hidden_size=64)
    with pytest.raises(UserError, match=r"gates for a width of 64, and model\.layers\.0\.self_attn has 32"):
        logits(llama, models.tokens(1, 4), constant(tmp_path / "wide", 1.0, wide))


def test_soft_equals_hard_at_saturated_gates(llama):
    """Factors of 0 and 1 are masks: the training path gives what inference gives, at either relaxation."""
    policy, ids = DrawnGates(kv_heads=2), models.tokens(2, 18)
    gates = policy.trained
    hard = logits(llama, ids, DrawnGates())
    limit = 1e-6  # a dropped key has 1e-12 of its weight, which may be large beside the others
    assert_close(logits(llama, ids, SoftGates(trained=gates)), hard, limit)
    sharp = Gates(32, gates.kv_heads, 1, 4)
    sharp.load_state_dict(gates.state_dict())
    for layer in sharp.kv_heads:
        for p in sharp.gate(layer).out.parameters():
            p.data *= 1e5
    smooth = SoftGates(trained=sharp, relaxation="sigmoid")
    assert_close(logits(llama, ids, smooth), hard, limit)
    assert error(logits(llama, ids, SoftGates(trained=gates, relaxation="sigmoid")), hard) > 1e-2


def test_gradient_is_that_of_the_relaxed_objective():
    """The gradient is the finite difference of the relaxed loss; straight through, dropped tokens have one too."""
    model, ids = models.build("llama", dtype=torch.float64, num_hidden_layers=1), models.tokens(1, 10)
    gates = Gates(32, {0: 2}, 1, 4).double()
    torch.nn.init.normal_(gates.gate(0).out.weight, std=1.0)
    torch.nn.init.zeros_(gates.gate(0).out.bias)

    class Factors(torch.nn.Module):
        """A gate that gives what it is told."""

        def __init__(self, logits):
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, hidden, real=None):
            return self.logits

    start = torch.linspace(-2, 2, 20, dtype=torch.float64).view(1, 2, 10)
    gates.layers["0"] = Factors(start.clone())
    gates.gate = lambda layer: gates.layers["0"]

    def loss(relaxation):
        with manyheads.use(model, SoftGates(trained=gates, relaxation=relaxation)):
            made = model(ids, use_cache=False).logits[0, :-1]
            return torch.nn.functional.cross_entropy(made, ids[0, 1:])

    grad = torch.autograd.grad(loss("sigmoid"), gates.layers["0"].logits)[0]
    for place in ((0, 0, 1), (0, 1, 6)):
        h = 1e-2  # norms of the model are in float32
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                gates.layers["0"].logits.copy_(start)
                gates.layers["0"].logits[place] += sign * h
                ends.append(loss("sigmoid"))
            gates.layers["0"].logits.copy_(start)
        assert float(grad[place]) == pytest.approx(float((ends[0] - ends[1]) / (2 * h)), rel=5e-3)
    straight = torch.autograd.grad(loss("straight_through"), gates.layers["0"].logits)[0]
    assert bool((straight[0, 0, :7] != 0).all())  # all of them are dropped
    assert bool((straight[..., 8:] == 0).all()) and error(straight, grad) > 1e-3  # no later query has a loss


def test_eviction_loss():
    """The sum over layers of the distance from the target; its gradient turns there, a hinge's stops."""
    p = [torch.full((1, 2, 5), x, requires_grad=True) for x in (0.2, 0.6)]
    assert float(eviction_loss(p, 0.3)) == pytest.approx(0.4)
    assert float(eviction_loss(p, 0.3, hinge=True)) == pytest.approx(0.3)
    eviction_loss(p, 0.3).backward()
    assert bool((p[0].grad < 0).all()) and bool((p[1].grad > 0).all())
    p[0].grad = None
    eviction_loss(p, 0.3, hinge=True).backward()
    assert bool((p[0].grad == 0).all())


class Tokens:
    """A tokenizer of letters."""

    def encode(self, text, **_):
        return [ord(c) % models.VOCAB for c in text]


def batches(length=24, batch=4):
    from manyheads.data.texts import Text

    texts = [Text("a", "the quick brown fox jumps over the lazy dog. " * 40)]
    return id_batches(encoded(texts, Tokens()), length, batch)


def test_training_moves_gates_alone(tmp_path):
    """The model stays to the bit, gates move towards the target and the threshold meets it; resumed as in one go."""
    model = models.build("llama").requires_grad_(True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    get_batch = batches()

    def trained(steps, **more):
        return train_gates(model, get_batch, target=0.4, budget=12, num_heads=1, head_dim=4, lr=0.1, **more)

    whole = trained(12)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    fresh = gates_of(model, num_heads=1, head_dim=4)
    assert all(not torch.equal(whole.gate(n).out.weight, fresh.gate(n).out.weight) for n in whole.kv_heads)
    assert whole.about["steps"] == 12

    def cut(state, text, kept):
        assert text > 0 and 0 < kept <= 1
        if state.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(12, checkpoint=Checkpoint(tmp_path, every=4), on_step=cut)
    again = trained(12, checkpoint=Checkpoint(tmp_path, every=4))
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in whole.state_dict().items())
    spec = f"attention_gate:gates={whole.save(tmp_path / 'gates')}"
    ids = torch.cat([get_batch(-i) for i in range(1, 5)])
    with manyheads.use(model):
        cache = prefilled(model, spec, ids)
        kept = sum(int((s.live.positions() >= 0).sum()) for s in stores(cache)) / (2 * 2 * ids.numel())
    assert abs(kept - 0.4) < 0.1
    assert calibrate(model, whole, ids, 1.0) == 0.0


def test_the_loss_of_text_decides_who_stays():
    """Gates trained on the eviction loss alone are others."""
    model, get_batch = models.build("llama"), batches()
    with_text = train_gates(model, get_batch, target=0.5, budget=10, lr=0.05, num_heads=1, head_dim=4)
    blind = train_gates(model, get_batch, target=0.5, budget=10, lr=0.05, weight=1e6, num_heads=1, head_dim=4)
    assert any(error(with_text.gate(n).out.weight, blind.gate(n).out.weight) > 1e-3 for n in with_text.kv_heads)


@pytest.mark.slow
def test_recipe_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "gates"
    assert main(["--out", str(out), "--budget", "2 steps", "--length", "32", "--batch", "1", "--text", "code"]) == 0
    said = capsys.readouterr().out
    assert "step 1: loss of text" in said and f"attention_gate:gates={out}" in said
    assert sorted(path.name for path in out.iterdir()) == ["gates.json", "gates.safetensors"]
    assert Gates.load(out).about["text"] == "code" and Gates.load(out).sinks == 4


def test_recipe_refuses_in_a_line(tmp_path, capsys):
    (tmp_path / "gates.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path)])
    assert "name a new folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="above 0 and at most 1"):
        train_gates(models.tiny("llama"), batches(), target=0.0)


def test_compiled_storage(llama):
    """A cache with room decodes gates of the prompt as any other; those that go on are refused."""
    ids = models.tokens(1, 20)
    with manyheads.use(llama):
        fixed, plain = new_cache(llama, DrawnGates(), room=4), new_cache(llama, DrawnGates())
        for cache in (fixed, plain):
            step(llama, ids, cache)
        last = models.tokens(1, 1, seed=3)
        assert_close(step(llama, last, fixed), step(llama, last, plain), SAME)
        with pytest.raises(UserError, match="go on after the prompt, which cannot be compiled"):
            new_cache(llama, STEP, room=4)
