# SPDX-License-Identifier: Apache-2.0
"""FireQ's storage: which tokens are codes, which codes, how many bytes, and what attention reads of them."""

import pytest
import torch

import manyheads
from caches.codes import looked, packed
from manyheads import parse
from manyheads.attention.codec import INT4, kv_codec
from manyheads.caches._view import CacheView
from manyheads.integrations.transformers import new_cache
from manyheads.strategy import AttentionEdit
from oracles import models
from oracles.caches import held, prefilled, step, stores
from tolerance import SAME, assert_close, error

DIM, HEADS = 8, 2


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", [kv_codec(name) for name in ("int4", "k8v4", "fp8")], ids=lambda c: c.name)
@pytest.mark.parametrize("scaling", ["none", "pre", "both"])
def test_codes_are_those_of_the_scaled_keys(scaling, codec):
    """Each token as its vector alone is encoded; without factors that is plain INT4. The last tokens are left alone."""
    model, ids, window = models.tiny("llama"), models.tokens(2, 20), 6
    views = looked(model, ids)
    with manyheads.use(model):
        cache = prefilled(model, f"fireq:bits={codec.name},scaling={scaling},window_tokens={window}", ids)
        for t in range(3):
            step(model, models.tokens(2, 1, seed=t), cache)
    for store, seen in zip(stores(cache), views, strict=True):
        factors = parse(f"fireq:scaling={scaling}").key_scale(seen)
        keys = seen.k if factors is None else seen.k * factors[:, :, None]
        found = packed(store)
        assert sorted(found) == [(b, h, t) for b in range(2) for h in range(2) for t in range(23 - window)]
        for (b, h, t), (k_codes, v_codes, k_scale, v_scale) in found.items():
            if t < 20:
                for by, x, codes, scale in (
                    (codec.keys, keys, k_codes, k_scale),
                    (codec.values, seen.v, v_codes, v_scale),
                ):
                    want, own = by.encode(x[b, h, t])
                    assert want.view(torch.uint8).tolist() == codes and float(own) == scale
        if scaling != "none":
            plain = codec.keys.encode(seen.k[0, 0, 0])[0].view(torch.uint8).tolist()
            assert plain != found[0, 0, 0][0]


@pytest.mark.parametrize("scaling", ["none", "both"])
@pytest.mark.parametrize("bits", ["int4", "k8v4", "fp8"])
def test_bytes_of_a_stored_token(bits, scaling):
    """d / 2 (or d) bytes and 2 bytes of scale for K and for V, per token and head; 4 for its column."""
    model, window = models.tiny("llama"), 8
    sizes = {}
    with manyheads.use(model):
        for length in (64, 128):
            cache = prefilled(
                model, f"fireq:bits={bits},scaling={scaling},window_tokens={window}", models.tokens(1, length)
            )
            sizes[length] = cache.bytes()
            assert abs(cache.bytes() - held(cache)) <= 0.01 * held(cache)
            for store in stores(cache):
                flat = store.tokens.ragged
                key, value = {"int4": (DIM // 2, DIM // 2), "k8v4": (DIM, DIM // 2), "fp8": (DIM, DIM)}[bits]
                assert flat.k.shape[1] * flat.k.element_size() == key
                assert flat.v.shape[1] * flat.v.element_size() == value
                assert flat.k_scale.element_size() == flat.v_scale.element_size() == 2
    per_token = (sizes[128] - sizes[64]) / 64 / len(stores(cache)) / HEADS
    assert per_token == key + value + 2 * 2 + 4


def test_no_token_is_encoded_twice():
    """Codes of old tokens are the same after 1,000 more tokens, some of which come several at a time."""
    model = models.build("llama", max_position_embeddings=2048, num_hidden_layers=1).bfloat16()
    with manyheads.use(model):
        cache = prefilled(model, "fireq:window_tokens=4", models.tokens(1, 24))
        step(model, models.tokens(1, 1), cache)
        before = [packed(store) for store in stores(cache)]
        generator = torch.Generator().manual_seed(5)
        seen = 25
        while seen < 1025:
            new = 7 if seen % 50 == 0 else 1
            step(model, torch.randint(2, models.VOCAB, (1, new), generator=generator), cache)
            seen += new
        after = [packed(store) for store in stores(cache)]
    for old, new in zip(before, after, strict=True):
        assert len(old) == HEADS * 21 and len(new) >= HEADS * 1000
        assert all(new[key] == codes for key, codes in old.items())


def test_control_of_encoding_twice():
    """A cache that reads and writes its history again in the model's dtype does not hold what it held."""
    keys, factors = vectors(1, HEADS, 21, DIM), vectors(1, HEADS, DIM).exp()[:, :, None]
    first, scale = INT4.encode(keys * factors)
    again = (INT4.decode(first, scale, torch.float32) / factors).bfloat16()
    assert not torch.equal(INT4.encode(again * factors)[1], scale)


def read_back(x, codec, factors, old):
    """``x [B, Hkv, N, d]`` with the first ``old`` tokens as they are read from codes."""
    s = 1.0 if factors is None else factors[:, :, None]
    decoded = codec.decode(*codec.encode(x[:, :, :old].float() * s), torch.float32) / s
    return torch.cat([decoded.to(x.dtype), x[:, :, old:]], 2)


@pytest.mark.parametrize(
    "spec", ["", "scaling=none", "scaling=pre,bits=fp8", "scaling=pre,bits=k8v4", "scaling=post,beta=4.0"]
)
def test_attention_reads_what_is_stored(spec):
    """Decoding, and several tokens at a time, against attention over keys and values that were read back by hand."""
    window, sizes = 5, [16, 1, 1, 4, 1, 3, 1]
    policy = parse(f"fireq:window_tokens={window}" + (f",{spec}" if spec else ""))

    class ByHand(AttentionEdit):
        """The cache as an edit of full keys and values."""

        def edit(self, call):
            seen = call.k.shape[2]
            if seen == call.q.shape[2]:
                positions = torch.arange(seen).expand(*call.k.shape[:2], -1)
                call.state["factors"] = policy.key_scale(
                    CacheView(call.k, call.v, positions, torch.full((2,), seen), None, 1.0, None, None, call.site,
                         rotary=call.rotary)
                )  # fmt: skip
                return call
            old = seen - window - call.q.shape[2]  # tokens leave the window after they were looked at
            return call.replace(
                k=read_back(call.k, policy.codec.keys, call.state["factors"], old),
                v=read_back(call.v, policy.codec.values, None, old),
            )

    model, ids = models.tiny("llama"), models.tokens(2, sum(sizes))

    def run(cache, *strategies):
        with torch.no_grad(), manyheads.use(model, *strategies):
            cache = new_cache(model, parse(cache))
            return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)], 1)

    got, want, full = run(policy), run("full", ByHand()), run("full")
    assert_close(got, want, SAME)
    assert error(got, full) > 20 * error(got, want) and error(got[:, 16:], full[:, 16:]) > 1e-3
    assert torch.equal(got[:, :16], full[:, :16])


def test_tokens_in_the_window_are_as_the_model_made_them():
    """Nothing leaves a window of 64 here: without factors bit-equal reading, with them up to rounding."""
    model, ids = models.tiny("llama"), models.tokens(2, 30)
    with manyheads.use(model):
        full = prefilled(model, "full", ids)
        for spec, limit in (("fireq:scaling=none", 1e-6), ("fireq", SAME)):
            cache = prefilled(model, spec, ids)
            for t in range(5):
                last = models.tokens(2, 1, seed=t)
                twin = new_cache(model, parse("full"))
                step(model, torch.cat([ids, *[models.tokens(2, 1, seed=i) for i in range(t)]], 1), twin)
                assert_close(step(model, last, cache), step(model, last, twin), max(limit, SAME))
        assert full.get_seq_length() == 30


@pytest.mark.parametrize("scaling", ["none", "both"])
def test_an_outlying_pair_ruins_plain_int4_alone(scaling):
    """One rotary pair of every key 32 times larger, of every query 32 times smaller: the same model to the bit."""
    model, ids = models.build("llama"), models.tokens(2, 60)
    more = models.tokens(2, 12, seed=9)

    def off(spec):
        with torch.no_grad(), manyheads.use(model):
            caches = [new_cache(model, parse(s)) for s in (spec, "full")]
            logits = [[model(part, past_key_values=c).logits for part in (ids, more)][1] for c in caches]
        return error(*logits)

    with torch.no_grad():
        want = model(ids).logits
    plain = off(f"fireq:window_tokens=4,scaling={scaling}")
    for layer in model.model.layers:
        for projection, factor in ((layer.self_attn.k_proj, 32.0), (layer.self_attn.q_proj, 1 / 32)):
            projection.weight.unflatten(0, (-1, DIM))[:, [1, 1 + DIM // 2]] *= factor
    with torch.no_grad():
        assert torch.equal(model(ids).logits, want)
    worse = off(f"fireq:window_tokens=4,scaling={scaling}") / plain
    assert worse > 2 if scaling == "none" else worse < 1.3
