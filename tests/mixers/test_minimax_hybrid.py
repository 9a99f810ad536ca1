# SPDX-License-Identifier: Apache-2.0
"""MiniMax-01's hybrid: its schedule, its mixers, and transformers' own MiniMax computed by ours."""

import copy

import pytest
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM
from transformers.models.minimax.modeling_minimax import MiniMaxCache, MiniMaxLightningAttention, MiniMaxSparseMoeBlock

import manyheads
from manyheads.attention.decay import log_decay
from manyheads.errors import UserError
from manyheads.mixers.minimax_hybrid import HalfRotary, MiniMaxHybrid, MiniMaxLightning, SparseExperts
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.training import next_token_loss
from manyheads.training.matching import parameters_of
from oracles import mixers, models
from oracles.caches import greedy
from oracles.strategies import Watch
from tolerance import CLOSE, DRAWN, FORMULA, GRADIENT, SAME, WRONG, assert_close, error, nearly, spread_error

L, F = "linear_attention", "full_attention"
LAYERS = {"softmax last": (L, L, L, F), "softmax first": (F, L, F, L)}
BLOCK = 8


def build(types, dtype=torch.float32):
    torch.manual_seed(0)
    config = MiniMaxConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=len(types), num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=2, block_size=BLOCK,
        layer_types=list(types), bos_token_id=1, eos_token_id=None, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped product takes no float64
    return MiniMaxForCausalLM(config).eval().requires_grad_(False).to(dtype)


@pytest.fixture(scope="module", params=LAYERS)
def model(request):
    return build(LAYERS[request.param])


def tokens(*shape):
    return torch.randint(2, 97, shape, generator=torch.Generator().manual_seed(sum(shape)))


def lightning_of(model, layer=1):
    return next(m for m in model.modules() if isinstance(m, MiniMaxLightningAttention) and m.layer_idx >= layer)


def test_schedule():
    config = DecoderConfig(29, 32, 16, 4)
    kinds = [type(block.mixer) for block in Decoder("minimax_hybrid", config).blocks]
    assert [i for i, kind in enumerate(kinds) if kind is HalfRotary] == [7, 15]
    assert kinds.count(MiniMaxLightning) == 14
    for every, kind in ((0, MiniMaxLightning), (1, HalfRotary)):
        blocks = Decoder(MiniMaxHybrid(every=every), config).blocks
        assert {type(b.mixer) for b in blocks} == {kind}
    windows = [b.mixer.spec.window for b in Decoder("minimax_hybrid:every=2,window=9", config).blocks]
    assert windows == [9, None] * 8


def test_softmax_throughout_is_a_plain_transformer():
    ours, plain = (mixers.mixer(spec) for spec in ("minimax_hybrid:every=1,rotary=1", "softmax"))
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(2, 20, mixers.DIM, dtype=torch.float64)
    assert_close(ours(x)[0], plain(x)[0], FORMULA)
    half = mixers.mixer("minimax_hybrid:every=1")
    half.load_state_dict(ours.state_dict())
    assert error(half(x)[0], plain(x)[0]) > 1e-3
    q = torch.randn(1, 4, 20, 8, dtype=torch.float64)
    turned = half.transform_q(q, torch.arange(20)[None], torch.tensor([20]))
    assert torch.equal(turned[..., 4:], q[..., 4:]) and not torch.equal(turned[..., :4], q[..., :4])


def test_the_block_is_post_norm():
    assert MiniMaxHybrid().build(mixers.MixerConfig(32, 4, 4, 8, 0, 80, 64)).residual == (nearly(160**0.25), 1.0)
    block = mixers.decoder("minimax_hybrid:alpha=2").blocks[0]
    x = torch.randn(1, 9, mixers.DIM, dtype=torch.float64)
    h = block.mixer_norm(x)
    h = block.ffn_norm(2 * h + block.mixer(h)[0])
    assert_close(block(x, None)[0], 2 * h + block.ffn(h), FORMULA)


@pytest.mark.parametrize("spec", ["minimax_hybrid", "minimax_hybrid:every=1", "minimax_hybrid:window=2"])
def test_gradients(spec):
    mixers.gradients_are_right(spec)


def test_parts_of_a_sequence_combine():
    """The states of pieces, each from nothing: S = sum of decay^(tokens after the piece) S_p."""
    mixer = mixers.mixer("minimax_hybrid")
    x = torch.randn(1, 40, mixers.DIM, dtype=torch.float64)
    want = mixer(x)[1].kv
    states = [mixer(piece)[1].kv for piece in x.split(16, 1)]
    g = mixer.decay.double()[:, None, None]
    together = sum((g * left).exp() * s for s, left in zip(states, (24, 8, 0), strict=True))
    assert_close(together, want, FORMULA)
    assert error(sum((g * left).exp() * s for s, left in zip(states, (16, 8, 0), strict=True)), want) > 1e-3


def test_mixer_equals_transformers(model):
    theirs = lightning_of(model)
    ours = MiniMaxLightning.from_transformers(theirs).requires_grad_(False)
    assert_close(-ours.decay, theirs.slope_rate.flatten(), 1e-6)
    x = torch.randn(2, 3 * BLOCK + 3, 32)
    want, last = theirs(x, None, None, MiniMaxCache())
    got, state = ours(x)
    assert_close(got, want)
    assert_close(state.kv, last)
    ours.decay = log_decay("paper", 4, theirs.layer_idx, 4)
    assert error(ours(x)[0], want) > 1e-3


def test_model_equals_transformers(model):
    ids = tokens(2, 5 * BLOCK + 3)
    want = model(ids).logits
    with manyheads.use(model, "minimax_hybrid"):
        assert_close(model(ids).logits, want)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    mask[1, 3:7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = model(padded, attention_mask=mask, position_ids=positions).logits
    with manyheads.use(model, "minimax_hybrid"):
        got = model(padded, attention_mask=mask, position_ids=positions).logits
    assert_close(got[0, 3:], want[0, 3:])
    assert_close(got[1, 7:], want[1, 7:])


def test_control_another_decay_is_noticed(model):
    class Late(MiniMaxHybrid):
        def attend(self, call):
            call.recurrence.decay = call.recurrence.decay * 1.01
            return super().attend(call)

    ids = tokens(2, 27)
    want = model(ids).logits
    with manyheads.use(model, Late()):
        assert error(model(ids).logits, want) > SAME


def test_chunked_prefill_and_decoding(model):
    """Pieces of any size give what one pass gives, the state in the model's own cache in float32."""
    ids = tokens(2, 31)
    want, cache, parts = model(ids).logits, MiniMaxCache(), []
    with manyheads.use(model, "minimax_hybrid"):
        for a, b in ((0, 9), (9, 27), (27, 28), (28, 31)):
            parts.append(model(ids[:, a:b], past_key_values=cache).logits)
    assert_close(torch.cat(parts, 1), want)
    states = [x for x in cache.linear_cache if isinstance(x, torch.Tensor)]
    assert len(states) == model.config.layer_types.count(L) and cache.get_seq_length() == 31


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("layers", LAYERS)
def test_generates(layers, beams):
    """As without any cache, which is the truth: transformers' own cache mixes up the states of beams.

    In float64, where the scores of a random model do not tie.
    """
    model = build(LAYERS[layers], torch.float64)
    ids, how = tokens(2, 21), {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
    want = model.generate(ids, use_cache=False, **how)
    with manyheads.use(model, "minimax_hybrid"):
        assert torch.equal(model.generate(ids, **how), want)


def test_a_left_padded_batch_generates_as_its_rows(model):
    rows = [tokens(1, n)[0] for n in (17, 5, 11)]
    ids = torch.stack([torch.nn.functional.pad(row, (17 - len(row), 0)) for row in rows])
    mask = (ids != 0).long()
    with manyheads.use(model, "minimax_hybrid"):
        made, logits = greedy(model, ids, mask, count=6)
        for i, row in enumerate(rows):
            _, alone = greedy(model, row[None], forced=made[i : i + 1])
            assert_close(logits[i], alone[0], SAME)


def test_rows_of_the_cache(model):
    ids = tokens(2, 13)
    with manyheads.use(model, "minimax_hybrid"):
        cache = model(ids, use_cache=True).past_key_values
        before = [x for x in cache.linear_cache if isinstance(x, torch.Tensor)]
        for change, rows in ((lambda c: c.batch_select_indices(torch.tensor([1, 0, 1])), [1, 0, 1]),
                             (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
                             (lambda c: c.reorder_cache(torch.tensor([1, 1])), [1, 1])):  # fmt: skip
            other = model(ids, use_cache=True).past_key_values
            change(other)
            after = [x for x in other.linear_cache if isinstance(x, torch.Tensor)]
            assert all(torch.equal(x[rows], y) for x, y in zip(before, after, strict=True))
            keys = next(layer.keys for layer in other.layers if layer.get_seq_length())
            assert keys.shape[0] == len(rows)
        copied = copy.deepcopy(cache)  # a prompt read once and gone on with twice
        copied.reorder_cache(torch.tensor([1, 1]))
        kept = [x for x in cache.linear_cache if isinstance(x, torch.Tensor)]
        assert all(torch.equal(x, y) for x, y in zip(before, kept, strict=True)) and isinstance(copied, MiniMaxCache)
        state = next(x for x in copied.linear_cache if isinstance(x, torch.Tensor))
        assert torch.equal(state, before[0][[1, 1]])
    plain = model(ids, use_cache=True).past_key_values  # control: transformers' own
    state = next(x for x in plain.linear_cache if isinstance(x, torch.Tensor))
    plain.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(state, next(x for x in plain.linear_cache if isinstance(x, torch.Tensor)))


def test_the_state_is_float32_in_half_precision():
    model = build(LAYERS["softmax last"], torch.bfloat16)
    with manyheads.use(model, "minimax_hybrid"):
        cache = model(tokens(1, 9), use_cache=True).past_key_values
    assert {x.dtype for x in cache.linear_cache if isinstance(x, torch.Tensor)} == {torch.float32}


def test_gradients_through_the_port():
    model = build(LAYERS["softmax last"]).requires_grad_(True)
    other = copy.deepcopy(model)
    ids = tokens(2, 19)
    other(ids).logits.square().mean().backward()
    with manyheads.use(model, "minimax_hybrid"):
        model(ids).logits.square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        if "qkv" in name or "output_gate" in name:
            assert_close(mine.grad, theirs.grad, GRADIENT)


def test_the_port_leaves_no_trace(model):
    ids = tokens(1, 9)
    want = model(ids).logits
    with manyheads.use(model, "minimax_hybrid"):
        with pytest.raises(UserError, match="cannot hold together"), manyheads.use(model, "minimax_hybrid"):
            pass
        with manyheads.use(model, Watch()):  # another port, of the softmax layers
            assert_close(model(ids).logits, want)
    assert torch.equal(model(ids).logits, want)
    assert not any("forward" in vars(m) or "_manyheads" in vars(m) for m in model.modules())


def test_layers_and_refusals(model):
    layers = [i for i, kind in enumerate(model.config.layer_types) if kind == L]
    ids = tokens(1, 9)
    with manyheads.use(model, f"minimax_hybrid:layers={layers[0]}") as port:
        model(ids)
    assert len(port.state(port.strategies[0])) == 1
    with pytest.raises(UserError, match="finds no attention"), manyheads.use(models.tiny("llama"), "minimax_hybrid"):
        pass
    with pytest.raises(UserError, match="never called"), manyheads.use(model, "minimax_hybrid"):
        pass
    for wrong in ({"every": -1}, {"rotary": 2.0}, {"window": 0}, {"experts": 2, "top": 3}, {"experts": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            MiniMaxHybrid(**wrong)


def experts_by_formula(block, x, top):
    """Each token's ``top`` likeliest experts, weighed by the router's softmax over those."""
    rows = []
    for token in x.flatten(0, 1):
        y = torch.zeros_like(token)
        chosen = (block.gate.weight @ token).softmax(0).topk(top)
        for share, e in zip(chosen.values / chosen.values.sum(), chosen.indices, strict=True):
            gate, up = (block.experts.gate_up_proj[e] @ token).chunk(2)
            y = y + share * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
        rows.append(y)
    return torch.stack(rows).view_as(x)


def test_experts_are_those_of_transformers_and_of_the_formula():
    torch.manual_seed(0)
    ffn = SparseExperts(12, 20, experts=4, top=2).double()
    assert isinstance(ffn.block, MiniMaxSparseMoeBlock) and ffn.active_share == 0.5
    ffn.requires_grad_(False)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    rounding = torch.finfo(torch.float32).eps  # transformers takes the router's softmax in float32 of any input
    assert_close(ffn(x), experts_by_formula(ffn.block, x, 2), rounding)
    assert error(ffn(x), experts_by_formula(ffn.block, x, 1)) > 1e-2  # control
    weights = ffn.block.experts.gate_up_proj  # each half Xavier's of 12 and 20, both in one would be of 12 and 40
    found, draws = float(weights.square().mean().sqrt()), weights.numel()
    assert spread_error(found, (2 / 32) ** 0.5, draws, kurtosis=1.8) < DRAWN
    assert spread_error(found, (2 / 52) ** 0.5, draws, kurtosis=1.8) > WRONG


def test_experts_are_balanced_in_training_and_only_there():
    torch.manual_seed(0)
    config = DecoderConfig(29, 32, 2, 4)
    model = Decoder("minimax_hybrid:every=2,experts=4", config)
    ids = torch.randint(29, (2, 17))
    model.eval()
    plain = next_token_loss(model, ids)
    model.train()
    balanced = next_token_loss(model, ids)
    more = float(model.auxiliary_loss().detach())
    assert_close((balanced - plain).detach(), torch.tensor(more), CLOSE, unit=float(plain.detach()))
    assert 0.001 * 2 * 2 * 0.99 < more < 0.001 * 2 * 4  # of two layers, each 2 when even and at most 4
    balanced.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    next_token_loss(model, ids)
    assert float(model.auxiliary_loss()) == 0.0


def test_a_token_meets_as_many_parameters_with_experts_as_without():
    config = DecoderConfig(29, 32, 2, 4)
    dense = Decoder("minimax_hybrid:every=2", config)
    sparse = Decoder.matched("minimax_hybrid:every=2,experts=4", config, dense.parameters_held)
    assert abs(parameters_of(sparse) - parameters_of(dense)) <= 0.02 * parameters_of(dense)
    assert sum(p.numel() for p in sparse.parameters()) > 1.3 * parameters_of(dense)
    out = sparse(torch.randint(29, (1, 5)))[0]
    assert torch.isfinite(out).all()
