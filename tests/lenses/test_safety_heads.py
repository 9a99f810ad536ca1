# SPDX-License-Identifier: Apache-2.0
"""Heads along a direction: scores equal what heads write, ablation is per row, AHD is dropout of heads and no more."""

import math
from types import SimpleNamespace

import pytest
import torch

import manyheads
from manyheads.errors import UserError
from manyheads.integrations.transformers import find_sites
from manyheads.lenses.safety_heads import (
    AblateRows,
    Direction,
    HeadDropout,
    SafetyHeads,
    ahd_loss,
    difference_of_means,
    erased,
    find_direction,
    ranked,
    steered,
    strength,
)
from manyheads.lenses.safety_heads.refusal_direction import log_odds
from oracles import models
from oracles.trigger_prompts import MARK, OK, REFUSE, TRIGGERS, trigger_prompts
from tolerance import DRAWN, SAME, WRONG, assert_close, error, is_close, is_far, mean_error, nearly, share_error

NAMES = ("llama", "gpt2", "qwen3", "gemma2", "gpt_oss", "deepseek_v3")


class Outs(manyheads.strategy.AttentionWatch):
    def watch(self, call, out):
        call.state["out"] = out


@pytest.fixture
def saved(tmp_path):
    def save(vector, **about):
        return str(Direction(vector, **about).save(tmp_path / f"{len(vector)}.safetensors"))

    return save


def random_direction(width=32, seed=0):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed))


def written(model, inputs):
    """``O_h . r / |r|`` at the last token, through a dense product of every head with its slice of W_O."""
    outs = Outs()
    with manyheads.use(model, outs) as port, torch.no_grad():
        model(**inputs)
    rows = []
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    last = (mask * torch.arange(mask.shape[1])).argmax(1)
    vector = random_direction()
    for site, _ in find_sites(model):
        out = port.state(outs)[site.name]["out"]
        z = out[torch.arange(len(out)), last]  # [B, H, dv]
        weight = site.output().unflatten(1, z.shape[1:])  # [D, H, dv]
        heads = torch.einsum("bhv,dhv->bhd", z, weight)
        rows.append(heads @ vector / vector.norm())
    return torch.stack(rows, 1).double()  # [B, L, H]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_what_heads_write(name, saved):
    """Left-padded; scale and sign of the direction do not matter; watching changes no bit."""
    model, inputs = models.tiny(name), models.inputs(name)
    plain = models.forward(name, model)
    for factor in (1.0, -3.0):
        lens = SafetyHeads(direction=saved(factor * random_direction()))
        with manyheads.watch(model, lens) as seen, torch.no_grad():
            assert torch.equal(model(**inputs).logits, plain)
        found = seen.compute()
        score = torch.tensor(found.tables["score"].values)
        want = written(model, inputs)
        assert_close(score, want.abs(), SAME)
        assert_close(torch.tensor(found.tables["signed"].values), want * (1 if factor > 0 else -1), SAME)
        assert error(score, written(model, models.inputs(name, seed=1)).abs()) > 1e-3
    assert len(found.series["written"]) == 2 and len(found.notes) == 2
    often = found.tables["frequency"].values
    assert set(often.ravel()) <= {0.0, 1.0} and (often.reshape(2, -1).sum(1) == 2).all()  # a quarter of 8 heads


def test_all_heads_together_are_the_output_of_attention(saved):
    model, ids = models.tiny("llama"), models.tokens(2, 9)
    kept = {}
    handles = [
        module.register_forward_hook(lambda m, a, o, s=site.name: kept.update({s: o[0]}))
        for site, module in find_sites(model)
    ]
    with manyheads.watch(model, SafetyHeads(direction=saved(random_direction()))) as seen, torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    vector = random_direction()
    signed = torch.tensor(seen.compute().tables["signed"].values)
    for i, (site, _) in enumerate(find_sites(model)):
        want = kept[site.name][:, -1] @ vector / vector.norm()  # llama's projection has no bias
        assert_close(signed[:, i].sum(-1), want.double(), SAME)
        assert error(signed[:, i, 1:].sum(-1), want.double()) > 1e-2


def test_a_batch_is_its_rows_and_decoding_scores_the_prompt(saved):
    model, ids = models.tiny("llama"), models.tokens(3, 11)
    lens = SafetyHeads(direction=saved(random_direction()))
    with manyheads.watch(model, lens) as seen, torch.no_grad():
        model(ids)
        for row in ids:
            model(row[None])
        model.generate(ids, max_new_tokens=4, do_sample=False)
    values = torch.tensor(seen.compute().tables["score"].values)
    assert values.shape[0] == 9
    assert_close(values[:3], values[3:6], SAME)
    assert_close(values[:3], values[6:], SAME)
    assert error(values[:1], values[1:2]) > 1e-3
    assert len(seen.compute().series["written"][6]) == 11 + 3


def test_ranking_and_strength(saved):
    model, ids = models.tiny("llama"), models.tokens(2, 9)
    with manyheads.watch(model, SafetyHeads(direction=saved(random_direction()))) as seen, torch.no_grad():
        model(ids)
    score = seen.compute().tables["score"]
    flat = torch.tensor(score.values).flatten(1)
    for row, heads in enumerate(ranked(score, 3)):
        best = flat[row].argsort(descending=True)[:3]
        assert heads == tuple(f"{int(i) // 4}.{int(i) % 4}" for i in best)
    assert is_close(torch.tensor(strength(score, 2)), flat.sort(1, descending=True)[0][:, :2].sum(1))
    assert ranked(score, 3)[0] != ranked(score, 3)[1] or is_far(flat[0], flat[1])


def test_a_head_without_weights_scores_nothing(saved):
    model = models.build("llama")
    sites = [site for site, _ in find_sites(model)]
    sites[1].output()[:, 8:16] = 0
    with manyheads.watch(model, SafetyHeads(direction=saved(random_direction()))) as seen, torch.no_grad():
        model(models.tokens(2, 9))
    score = seen.compute().tables["score"].values
    assert (score[:, 1, 1] == 0).all() and (score[:, 1, [0, 2, 3]] > 0).all()


def test_rows_lose_their_own_heads():
    model, ids = models.tiny("llama"), models.tokens(2, 9)
    heads = (("0.1", "1.3"), ("1.0",))
    with manyheads.use(model, AblateRows(heads=heads)), torch.no_grad():
        got = model(ids).logits
    for row, gone in enumerate(heads):
        with manyheads.use(model, "ablate:heads=" + "+".join(gone)), torch.no_grad():
            assert_close(got[row], model(ids[row : row + 1]).logits[0], SAME)
        with manyheads.use(model, "ablate:heads=" + "+".join(heads[1 - row])), torch.no_grad():
            assert error(got[row], model(ids[row : row + 1]).logits[0]) > 1e-3
    with pytest.raises(UserError, match="given for 2 rows"), manyheads.use(model, AblateRows(heads=heads)):
        model(ids[:1])
    with pytest.raises(UserError, match="heads 0 to 3"), manyheads.use(model, AblateRows(heads=(("0.9",),))):
        model(ids[:1])


def test_erasing_and_adding():
    """Nothing is left along an erased direction between blocks; adding acts where it is asked to; all is undone."""
    model, ids = models.tiny("llama"), models.tokens(2, 9)
    plain = models.forward("llama", model)
    vector = random_direction()
    kept = []

    class Read(manyheads.strategy.Residual):
        def residual(self, site, hidden, memory):
            kept.append(hidden)
            return hidden

    with erased(model, vector), manyheads.use(model, Read()), torch.no_grad():
        model(ids)
    assert all(((h @ vector).abs().max() / h.norm(dim=-1).max() < 1e-5) for h in kept[1:])
    with manyheads.use(model, Read()), torch.no_grad():
        kept.clear()
        model(ids)
        before = kept[0]
        assert (before @ vector).abs().max() > 1e-2
        with steered(model, vector, 1):
            kept.clear()
            model(ids)
    assert torch.equal(kept[0], before)  # added behind the first block
    assert torch.equal(models.forward("llama", model), plain)
    with pytest.raises(ZeroDivisionError), erased(model, vector):
        raise ZeroDivisionError
    assert torch.equal(models.forward("llama", model), plain)


def test_difference_of_means_is_one_of_hidden_states():
    model = models.build("llama")
    first, second = list(models.tokens(5, 9)), list(models.tokens(4, 7, seed=1))
    got = difference_of_means(model, first, second, positions=(-2, -1))

    def mean(prompts):
        with torch.no_grad():
            states = [model(p[None], output_hidden_states=True).hidden_states for p in prompts]
        return torch.stack([torch.stack([s[layer][0, -2:].double() for s in states]).mean(0) for layer in range(2)])

    assert_close(got, mean(first) - mean(second), SAME)
    assert error(got, mean(second) - mean(first)) > 1


def toy(steps=120):
    """A small model that has learned to refuse, and prompts of both kinds."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=32, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        made = trigger_prompts(64, 10, 0.5, 40, torch.Generator().manual_seed(step))
        model(input_ids=made.ids, labels=made.labels(copy=False)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made = trigger_prompts(128, 10, 0.5, 40, torch.Generator().manual_seed(10_000))
    return model.eval(), [list(made.rows(kind).ids[:, :-1]) for kind in (True, False)]


def test_the_direction_of_a_toy_is_what_its_refusals_hang_on(tmp_path):
    model, (bad, good) = toy()
    found = find_direction(
        model, bad[:32], good[:32], answers=[REFUSE], check=(bad[32:], good[32:]), positions=(-2, -1), max_kl=1.0
    )
    assert found.layer < 3 * 0.8 and found.position in (-2, -1)
    assert float(found.about["log odds when erased"]) < float(found.about["log odds"]) - 2
    assert float(found.about["steering"]) >= 0 and float(found.about["kl"]) <= 1.0
    again = Direction.load(found.save(tmp_path / "d.safetensors"))
    assert torch.equal(again.vector, found.vector) and (again.layer, again.about) == (found.layer, found.about)
    other = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ids = torch.stack(bad[32:])

    def odds():
        with torch.no_grad():
            return float(log_odds(model(ids).logits[:, -1], [REFUSE]).mean())

    before = odds()
    assert before > 2
    with erased(model, found.vector):
        assert odds() == pytest.approx(float(found.about["log odds when erased"]), abs=3e-5)  # the prompts of `check`
    with erased(model, other):
        assert abs(odds() - before) < 0.5 * (before - float(found.about["log odds when erased"]))
    with pytest.raises(UserError, match="fell out"):
        find_direction(model, bad[:8], good[:8], answers=[OK], check=(good[8:16], bad[8:16]), max_kl=0.0)


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_dropout_of_heads(p):
    model, ids = models.build("llama").train(), models.tokens(3, 9)
    outs = Outs()
    plain = Outs()
    strategy = HeadDropout(p=p)
    with manyheads.use(model, plain, strategy, outs) as port:
        torch.manual_seed(1)
        model(ids)
        for name, memory in port.state(outs).items():
            before = port.state(plain)[name]["out"]
            heads = (memory["out"] / before).nan_to_num().amax((0, 1, 3))  # one draw for all rows, tokens and channels
            whole = torch.where(heads > 0.5, 1 / (1 - p), 0.0)[:, None]
            assert_close(memory["out"], whole * before, SAME)
            assert error(memory["out"], 0.9 * whole * before) > WRONG * SAME
    for still, mode in ((HeadDropout(p=0.0), True), (strategy, False)):
        model.train(mode)
        want = model(ids).logits
        with manyheads.use(model, still):
            assert torch.equal(model(ids).logits, want)
    with pytest.raises(UserError, match="below 1"):
        HeadDropout(p=1.0)


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_heads_are_kept_as_often_as_p_says_and_keep_their_mean(p):
    call, ones = SimpleNamespace(training=True), torch.ones(1, 1, 8, 1)
    factors = torch.cat([HeadDropout(p=p).patch(call, ones).flatten() for _ in range(1000)])
    kept = torch.bincount((factors > 0).long(), minlength=2)
    assert share_error(kept, torch.tensor([p, 1 - p])) < DRAWN
    assert share_error(kept, torch.tensor([p + 0.05, 0.95 - p])) > WRONG  # the control: another p
    deviation = math.sqrt(p / (1 - p))
    assert mean_error(factors, 1.0, deviation) < DRAWN
    assert mean_error(0.9 * factors, 1.0, 0.9 * deviation) > WRONG  # the control: a scale a tenth too small


def test_a_dropped_head_learns_nothing():
    model, ids = models.build("llama").train(), models.tokens(2, 9)
    for parameter in model.parameters():
        parameter.requires_grad_(True)

    class Drop(HeadDropout):
        def patch(self, call, out):
            factor = torch.ones(out.shape[2])
            factor[2] = 0.0
            return out * factor[:, None]

    for strategy in (Drop(), HeadDropout(p=0.0)):
        model.zero_grad()
        with manyheads.use(model, strategy):
            model(input_ids=ids, labels=ids).loss.backward()
        grad = model.model.layers[1].self_attn.q_proj.weight.grad.unflatten(0, (4, 8))
        assert (grad[2].abs().max() == 0) == (strategy.p > 0) and (grad[[0, 1, 3]].abs().amax((1, 2)) > 0).all()


def test_a_step_weighs_its_parts_and_spares_the_anchors():
    model = models.build("llama").train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    safety, anchor = ({"input_ids": models.tokens(n, 9, seed=n), "labels": models.tokens(n, 9, seed=n)} for n in (1, 4))
    weight = model.model.layers[0].self_attn.v_proj.weight

    def grads(alpha, dropout, spare=True):
        model.zero_grad()
        losses = []
        with manyheads.use(model, dropout):
            for term in ahd_loss(dropout, alpha, spare)(model, (safety, anchor)):
                term.backward()
                losses.append(float(term.detach()))
        assert not dropout.state
        return weight.grad.clone(), losses

    def grad_of(batch):
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return weight.grad.clone(), float(loss.detach())

    still = HeadDropout(p=0.0)
    (one, first), (two, second) = grad_of(safety), grad_of(anchor)
    for alpha, share in ((0.2, 0.2), (None, 0.2), (0.7, 0.7)):  # 8 labels against 32
        got, losses = grads(alpha, still)
        assert_close(got, share * one + (1 - share) * two, SAME)
        assert losses == nearly([share * first, (1 - share) * second], torch.float32)
    torch.manual_seed(0)
    _, losses = grads(0.2, HeadDropout(p=0.5))
    assert losses[0] != pytest.approx(0.2 * first, rel=1e-3) and losses[1] == nearly(0.8 * second, torch.float32)
    _, losses = grads(0.2, HeadDropout(p=0.5), spare=False)
    assert losses[1] != pytest.approx(0.8 * second, rel=1e-3)


def test_refusals(tmp_path, saved):
    model, ids = models.tiny("llama"), models.tokens(1, 5)
    with pytest.raises(UserError, match="needs direction=FILE"), manyheads.watch(model, "safety_heads"):
        model(ids)
    with pytest.raises(UserError, match="holds no direction"):
        Direction.load(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="not all 0"):
        Direction.load(saved(torch.zeros(32)))
    lens = SafetyHeads(direction=saved(random_direction(16)))
    with pytest.raises(UserError, match="find the direction on this model"), manyheads.watch(model, lens):
        model(ids)
    with pytest.raises(UserError, match="at least 1, not 0"):
        manyheads.parse("safety_heads:top=0")
    with pytest.raises(UserError, match="blocks of Linear are not known"), erased(torch.nn.Linear(2, 2), torch.ones(2)):
        pass
    with pytest.raises(UserError, match="at least 8 tokens"):
        trigger_prompts(4, 5, 0.5, 40, torch.Generator())


def test_prompts_of_the_toy():
    made = trigger_prompts(200, 12, 0.25, 64, torch.Generator().manual_seed(0))
    inside = torch.isin(made.ids[:, :-1], torch.tensor(list(TRIGGERS))).any(1)
    assert torch.equal(inside, made.triggered) and int(inside.sum()) == 50
    assert ((made.ids[:, -1] == REFUSE) == made.triggered).all() and (made.ids[~made.triggered, -1] == OK).all()
    assert (made.ids[:, made.mark] == MARK).all() and torch.equal(made.ids[:, made.mark + 1], made.ids[:, 0])
    assert (made.labels() != -100).sum() == 400 and (made.labels(copy=False) != -100).sum() == 200
    assert len(made.rows(True).ids) == 50 and made.rows(False).triggered.sum() == 0
