# SPDX-License-Identifier: Apache-2.0
"""Sparse-GIN on frozen models: against a dense forward written by hand, the released defect, caches, training."""

import pytest
import torch

import manyheads
from manyheads import UserError, parse
from manyheads.call import AttentionCall, Site
from manyheads.integrations.transformers import find_sites, new_cache
from manyheads.mixers.graph_gin_attention import Adapter, Adapters, Lora, LoraLayers
from manyheads.mixers.graph_gin_attention.adapter import edges, shuffled
from manyheads.recipes.graph_gin_attention import new_adapters, train_adapters
from manyheads.tasks.text.adapted_loss import losses
from oracles import models
from tolerance import DEEP, FORMULA, SAME, assert_close, is_far, nearly

# Llama's norms compute in float32 whatever the model is in, so that its float64 forwards agree to SAME.
GRAPHS = ("intended", "released", "bottleneck", "random")
FROZEN = {"intended": "exchange", "random": "exchange"}


def drawn(model, width=6, **settings):
    """Adapters with large random weights, so that graphs matter."""
    torch.manual_seed(1)
    made = Adapters.of(model.config.hidden_size, [site for site, _ in find_sites(model)], width=width, **settings)
    for name, p in made.named_parameters():
        if not name.endswith("scale"):
            torch.nn.init.normal_(p, std=0.5)
    for layer in made.kv_heads:
        made.gin(layer).scale.data.fill_(0.7)
    return made.requires_grad_(False).eval()


def logits(model, ids, *strategies, **given):
    with manyheads.use(model, *strategies), torch.no_grad():
        return model(ids, use_cache=False, **given).logits


def by_hand(model, adapters, ids, graph):
    """Logits of a Llama with eager attention, the adapter in front of its feed-forward, in full matrices."""
    length = ids.shape[1]
    future = torch.ones(length, length).triu(1).bool()
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(future, torch.finfo(torch.float64).min)
    x = model.model.embed_tokens(ids)
    tables = model.model.rotary_emb(x, torch.arange(length)[None])
    for i, layer in enumerate(model.model.layers):
        out, attention = layer.self_attn(layer.input_layernorm(x), position_embeddings=tables, attention_mask=mask)
        x, gin = x + out, adapters.gin(i).double()
        w = torch.sigmoid(10 * (attention.sum(1).clamp(max=1) - 0.1))
        w = torch.where(w > 0.6, w, 0.0).tril()
        # As released: rows are sources, columns targets, and what stays is source <= target.
        w = {"intended": w, "released": w.triu(), "bottleneck": torch.eye(length, dtype=torch.float64)}[graph]
        z = gin.project(x)
        g = gin.eps * z + w @ z
        g = g + gin.second(torch.where(gin.first(g) > 0, gin.first(g), gin.act.weight * gin.first(g)))
        g = gin.out(torch.where(g > 0, g, gin.act.weight * g))
        x = x + gin.scale * gin.norm.weight * g / (g.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.lm_head(model.model.norm(x))


@pytest.fixture(scope="module")
def llama():
    return models.tiny("llama", torch.float64)


@pytest.fixture(scope="module")
def adapters(llama):
    return drawn(llama)


@torch.no_grad()
def test_is_its_formula_in_a_model(llama, adapters):
    ids, eager = models.tokens(2, 15), models.build("llama", attn="eager", dtype=torch.float64)
    want = {graph: by_hand(eager, adapters, ids, graph) for graph in GRAPHS[:3]}
    for graph, wanted in want.items():
        assert_close(logits(llama, ids, Adapter(live=adapters, direction=graph)), wanted, SAME)
        assert_close(logits(eager, ids, Adapter(live=adapters, direction=graph)), wanted, SAME)
    assert is_far(want["released"], want["intended"], 1e-3) and is_far(want["bottleneck"], want["released"], 1e-3)


def test_at_lambda_zero_nothing_changes(llama):
    ids, adapters = models.tokens(2, 15), drawn(llama)
    plain = logits(llama, ids)
    assert is_far(logits(llama, ids, Adapter(live=adapters)), plain, 1e-3)
    adapters = drawn(llama)
    for layer in adapters.kv_heads:
        adapters.gin(layer).scale.data.zero_()
    assert torch.equal(logits(llama, ids, Adapter(live=adapters)), plain)


def call_of(q, k):
    site = Site("here", 0, 0, "self", True, q.shape[1], k.shape[1], peers=(0,))
    return AttentionCall(site, q, k, k, q.shape[-1] ** -0.5, is_causal=True)


def test_released_exchanges_nothing_between_tokens(adapters):
    """The defect: whatever another token becomes, with attention as it is, no other position notices."""
    torch.manual_seed(0)
    q, k = (torch.randn(1, heads, 9, 8, dtype=torch.float64) for heads in (4, 2))
    hidden = torch.randn(1, 9, adapters.config["dim"], dtype=torch.float64)
    call, other = call_of(q, k), hidden.clone()
    other[:, 3] = -other[:, 3]
    for graph in GRAPHS:
        strategy = Adapter(live=adapters, direction=graph)
        before, after = (strategy.added(call.site, x, {"call": call}) for x in (hidden, other))
        changed = (after != before).any(-1)[0].nonzero().flatten().tolist()
        if graph in FROZEN:  # control: a graph between tokens
            assert changed[0] == 3 and len(changed) > 1
        else:
            assert changed == [3]


def test_a_graph_of_self_loops_is_what_was_released(adapters):
    q = torch.eye(8, dtype=torch.float64).expand(1, 4, 8, 8) * 40
    hidden = torch.randn(1, 8, adapters.config["dim"], dtype=torch.float64)
    for sharp in (True, False):
        call = call_of(q if sharp else q / 40, q[:, :2] if sharp else q[:, :2] / 40)
        intended, released = (
            Adapter(live=adapters, direction=graph).added(call.site, hidden, {"call": call})
            for graph in ("intended", "released")
        )
        assert torch.equal(intended, released) if sharp else is_far(intended, released, 1e-3)


def test_random_edges_have_the_same_weights_elsewhere():
    torch.manual_seed(0)
    call = call_of(*(torch.randn(2, 2, 12, 8, dtype=torch.float64) * 3 for _ in range(2)))
    (_, w), (_, moved) = next(edges(call)), next(edges(call, "random"))
    assert_close(moved.sort(-1).values, w.sort(-1).values, FORMULA)
    assert not moved.triu(1).any() and is_far(moved, w, 0.1)
    seen = torch.ones(12, 12).tril().bool().expand_as(w)
    assert torch.equal(shuffled(w[:, 7:], seen[:, 7:], 7), moved[:, 7:])  # decoding draws alike


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_cached_reading_is_one_forward(name, graph):
    model, given = models.tiny(name, torch.float64), models.inputs(name)
    strategy, ids, mask = Adapter(live=drawn(model), direction=graph), given["input_ids"], given["attention_mask"]
    with manyheads.use(model, strategy):
        want = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        past, parts = None, []
        for a, b in ((0, 7), (7, 8), (8, 16), *((i, i + 1) for i in range(16, 19))):
            at = (mask[:, :b].cumsum(1) - 1).clamp(min=0)[:, a:]
            out = model(ids[:, a:b], attention_mask=mask[:, :b], position_ids=at, past_key_values=past)
            past = out.past_key_values
            parts.append(out.logits)
    if graph == "random" and name == "gemma3_text":  # places are drawn by column; a sliding window's are others
        return
    if name == "gpt2":
        at = (mask.cumsum(1) - 1).clamp(min=0)
        with manyheads.use(model, strategy):
            want = model(ids, attention_mask=mask, position_ids=at, use_cache=False).logits[mask.bool()]
    assert_close(torch.cat(parts, 1)[mask.bool()], want, 10 * DEEP if name == "gpt2" else SAME)


@torch.no_grad()
def test_padding_on_the_left_changes_nothing(llama, adapters):
    ids = models.tokens(1, 12)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    for graph in GRAPHS[:3]:
        strategy = Adapter(live=adapters, direction=graph)
        assert_close(logits(llama, padded, strategy, attention_mask=mask)[:, 4:], logits(llama, ids, strategy), SAME)
    assert is_far(logits(llama, padded, strategy)[:, 4:], logits(llama, ids, strategy), 1e-3)  # control: no mask


@pytest.mark.filterwarnings("ignore:.*not every run went through")
@torch.no_grad()
def test_what_cannot_be_followed_is_refused(llama, adapters):
    ids, strategy = models.tokens(2, 12), Adapter(live=adapters)
    before = llama(ids).past_key_values
    with manyheads.use(llama, strategy):
        with pytest.raises(UserError, match="same use"):
            llama(ids[:, :1], past_key_values=before)
        read = llama(ids).past_key_values
        read.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(UserError, match="beam search"):
            llama(ids[:, :1], past_key_values=read)
    evicting = parse("streaming_llm:budget=6,schedule=prefill")
    with pytest.raises(UserError, match="dropped tokens"), manyheads.use(llama, strategy, evicting):
        cache = new_cache(llama, evicting)
        llama(ids, past_key_values=cache)
        llama(ids[:, :1], past_key_values=cache)
    narrow = drawn(llama)
    narrow.config["dim"] = 16
    with pytest.raises(UserError, match="width"), manyheads.use(llama, Adapter(live=narrow)):
        llama(ids)


@torch.no_grad()
def test_a_block_in_parallel_is_refused():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    for parallel in (True, False):
        config = GPTNeoXConfig(**sizes, num_attention_heads=2, use_parallel_residual=parallel)
        model = GPTNeoXForCausalLM(config).eval()
        with manyheads.use(model, Adapter(live=drawn(model))):
            if parallel:
                with pytest.raises(UserError, match="one stream"):
                    model(torch.zeros(1, 4, dtype=torch.long))
            else:
                model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize("kind", ["intended", "bottleneck", "lora"])
def test_training_lowers_the_loss_of_what_is_frozen(kind, tmp_path):
    model = models.build("llama")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ids, seen = models.tokens(2, 17), []
    made = train_adapters(
        model, lambda _: ids, kind=kind, width=8, dropout=0.0, budget=8, lr=3e-2,
        on_step=lambda state: seen.append(float(state.loss)),
    )  # fmt: skip
    assert seen[-1] < seen[0] - 0.05
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    folder = made.save(tmp_path / kind)
    part = "lora:weights" if kind == "lora" else "adapter:adapters"
    again = parse(f"graph_gin_attention.{part}={folder}")
    live = Lora(live=made) if kind == "lora" else Adapter(live=made)
    assert torch.equal(logits(model, ids, again), logits(model, ids, live))
    assert is_far(logits(model, ids, again), logits(model, ids), 1e-3)


def test_lora_starts_as_the_model_and_is_of_equal_size(llama):
    small, lora = new_adapters(llama, "intended", width=24), new_adapters(llama, "lora", width=24)
    sizes = [sum(p.numel() for p in made.parameters()) for made in (small, lora)]
    assert abs(sizes[1] / sizes[0] - 1) < 0.15 and isinstance(lora, LoraLayers)  # one rank is an eighth of it here
    ids = models.tokens(1, 9)
    assert_close(logits(llama, ids, Lora(live=lora.requires_grad_(False))), logits(llama, ids), DEEP)
    assert list(new_adapters(llama, width=8).scales().values()) == nearly([0.0, 0.5])


def test_losses_of_answers_know_no_padding():
    model = models.tiny("llama")
    problems = [(3, list(range(2, 9))), (5, list(range(4, 30))), (2, [7, 8, 9])]
    together = losses(model, problems)
    for (start, ids), found in zip(problems, together, strict=True):
        nats = -model(torch.tensor([ids])).logits[0].log_softmax(-1)
        by_hand = [float(nats[i - 1, ids[i]]) for i in range(start, len(ids))]
        assert found == pytest.approx(sum(by_hand) / len(by_hand), rel=10 * SAME)
    assert losses(model, problems, Adapter(live=drawn(model))) != pytest.approx(together, rel=1e-3)


@pytest.mark.parametrize("spec", ["adapter", "adapter:adapters=nowhere,direction=up", "lora"])
def test_refusals(spec):
    with pytest.raises(UserError):
        parse(f"graph_gin_attention.{spec}")
