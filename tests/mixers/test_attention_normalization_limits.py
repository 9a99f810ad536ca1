# SPDX-License-Identifier: Apache-2.0
"""Other normalizers in a model equal loops over rows, and the measures of a model equal those of its dense maps."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import manyheads
from manyheads import UserError, parse, use
from manyheads.attention.normalizers import NORMALIZERS, log_n_scale
from manyheads.call import MixerConfig
from manyheads.calls.statistics import LogPowerSum
from manyheads.calls.weights import measure
from manyheads.mixers.attention_normalization_limits import NormalizationMeasures, Normalized, normalized_attention
from manyheads.mixers.attention_normalization_limits.measures import chosen, row_measures, softmax_norms
from manyheads.models.decoder import Decoder, DecoderConfig
from oracles import dense, mixers, models
from oracles.normalizers import literal
from tolerance import CLOSE, FORMULA, PROJECTED, SAME, assert_close, error, is_close, is_far

SLUG = "attention_normalization_limits"
KINDS = [kind for kind in NORMALIZERS if kind != "softmax"]


@dataclass(frozen=True, kw_only=True)
class Keep(manyheads.strategy.AttentionWatch):
    """Keep every call and its output."""

    kept: list

    def watch(self, call, out):
        self.kept.append((call, out))


def loops(call, kind):
    """The output of a call in float64, row by row."""
    heads = call.q.shape[1]
    q, k, v = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (call.q, call.k, call.v))
    x = q @ k.mT * call.scale
    if call.softcap is not None:
        x = (x / call.softcap).tanh() * call.softcap
    seen = call.allowed()
    seen = torch.ones_like(x, dtype=torch.bool) if seen is None else seen.expand(x.shape)
    if call.bias is not None:
        x, seen = x + call.bias, seen & (call.bias > -1e30)
    out = torch.zeros(*x.shape[:3], v.shape[3], dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist():
        row = tuple(place)
        if seen[row].any():
            weights = literal(x[row][seen[row]], kind, k=3, s=log_n_scale(16))
            out[row] = weights @ v[row[0], row[1]][seen[row]]
    return out.transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in KINDS), ("gemma2", "ssmax"), ("gemma2", "entmax15"), ("t5", "sigmoid")],
)
def test_a_model_attends_by_the_formula(name, kind):
    kept, model = [], models.tiny(name)
    with use(model, f"{SLUG}:normalizer={kind},k=3,trained=16", Keep(kept=kept)), torch.no_grad():
        models.forward(name, model)
    call, out = kept[-1]
    want = loops(call, kind)
    assert_close(out, want, 16 * CLOSE)
    assert error(call.attend(), want) > 1e-3  # control: softmax


def test_softmax_is_the_model_itself():
    model, inputs = models.tiny("llama"), models.inputs("llama")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        want = model(**inputs).logits[real]
        with use(model, f"{SLUG}:normalizer=softmax"):
            assert_close(model(**inputs).logits[real], want, SAME)
        with use(model, f"{SLUG}:normalizer=softmax,temperature=0.5"):
            assert is_far(model(**inputs).logits[real], want, SAME)  # control


@pytest.mark.parametrize("kind", ["ssmax", "entmax15", "topk", "sigmoid"])
def test_decoding_and_blocks_give_what_one_forward_gives(kind, monkeypatch):
    model, inputs, spec = models.tiny("llama"), models.inputs("llama"), f"{SLUG}:normalizer={kind},k=3"
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    real, places = mask.bool(), (mask.cumsum(1) - 1).clamp(min=0)
    assert not real.all()  # rows are padded

    def read(start, stop, **more):
        cut = slice(start, stop)
        return model(
            input_ids=ids[:, cut], attention_mask=mask[:, :stop], position_ids=places[:, cut], use_cache=True, **more
        )

    size = ids.shape[1]
    plain = read(0, size).logits[real]
    with torch.no_grad(), use(model, spec):
        want = read(0, size).logits[real]
        made = read(0, 9)
        parts = [made.logits]
        parts += [read(t, t + 1, past_key_values=made.past_key_values).logits for t in range(9, size)]
        monkeypatch.setattr("manyheads.attention.reference.block_size", lambda x, per_row: 4)
        blocks = read(0, size).logits[real]
    assert_close(blocks, want, SAME)
    assert_close(torch.cat(parts, 1)[real], want, SAME)
    assert is_far(plain, want, SAME)  # control: softmax


def test_half_precision_and_gradients_through_a_model():
    model, ids = models.build("llama").requires_grad_(True), models.tokens(2, 10)
    with use(model, f"{SLUG}:normalizer=entmax15"):
        model(ids, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(g is None or g.isfinite().all() for g in gradients) and any(g.abs().max() > 0 for g in gradients)
    half = models.build("llama", dtype=torch.bfloat16)
    with torch.no_grad(), use(half, f"{SLUG}:normalizer=entmax15"):
        assert half(ids).logits.dtype == torch.bfloat16


def test_refusals():
    with pytest.raises(UserError, match="learned sinks"), use(models.tiny("gpt_oss"), SLUG):
        models.forward("gpt_oss", models.tiny("gpt_oss"))
    with pytest.raises(UserError, match="past only"):
        Normalized(position="alibi").build(MixerConfig(16, 2, 2, 8, 0, 1, 32, causal=False))
    for wrong in ("normalizer=entmax,alpha=3", "trained=1", "normalizer=topk,k=0"):
        with pytest.raises(UserError):
            parse(f"{SLUG}:{wrong}")
    for wrong in ("shares=1.5", "counts=0", "per_octave=0", "temperatures=-1"):
        with pytest.raises(UserError):
            parse(f"{SLUG}.measures:{wrong}")


def test_a_layer_starts_as_softmax_does_and_learns_its_scale():
    config = DecoderConfig(29, dim=16, layers=1, heads=2, length=12)
    ids = torch.randint(29, (2, 12), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = Decoder("softmax:position=alibi", config)
    for kind, same in (("softmax", True), ("topk,k=12", True), ("entmax15", False), ("ssmax", False)):
        made = Decoder(f"{SLUG}:normalizer={kind},position=alibi", config)
        made.load_state_dict(plain.state_dict(), strict=False)
        got = made(ids)[0]
        assert is_close(got, plain(ids)[0], SAME) == same
        got.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
        if kind == "ssmax":  # the last row sees as many keys as in training
            assert_close(got[:, -1], plain(ids)[0][:, -1], SAME)


@pytest.mark.parametrize("kind", ["entmax15", "topk,k=5", "sigmoid"])
def test_a_layer_keeps_what_mixers_promise(kind):
    """The default, ``ssmax``, is among the mixers of the oracles; entmax rounds more, for its threshold."""
    mixers.check(f"{SLUG}:normalizer={kind},position=alibi", 4 * PROJECTED)


# The measures.


def drawn(seed=0, heads=3, rows=5, size=12, dim=4):
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(1, heads, rows, size, generator=generator, dtype=torch.float64)
    v = torch.randn(1, heads, size, dim, generator=generator, dtype=torch.float64)
    seen = torch.rand(1, 1, rows, size, generator=generator) < 0.8
    seen[..., :2] = True
    return x.masked_fill(~seen, -torch.inf).softmax(-1), v, seen.expand(x.shape)


def by_hand(p, v, seen, count):
    """Distance, bound and separability of one row, from their definitions."""
    keys = [i for i in range(len(p)) if seen[i]]
    top = sorted(keys, key=lambda i: -float(p[i]))[:count]
    s = sum(p[i] * v[i] for i in keys)
    distance = (s - sum(p[i] * v[i] for i in top)).norm() / max(v[i].norm() for i in keys)
    balls = [(p[i] * v[i] - s).norm() for i in keys if i not in top]
    apart = [i for i in top if not balls or (p[i] * v[i] - s).norm() < min(balls)]
    return float(distance), 1 - float(sum(p[i] for i in top)), len(apart) / len(top)


@pytest.mark.parametrize("count", [1, 3, 7, 40])
def test_measures_of_rows_are_their_definitions(count):
    p, v, seen = drawn()
    top = chosen(p, seen, torch.tensor(count))
    got = torch.stack([x.double() for x in row_measures(p, v, seen, top)], -1)
    wrong = torch.stack([x.double() for x in row_measures(p, v.flip(2), seen, top)], -1)
    want = torch.tensor([[by_hand(p[0, h, t], v[0, h], seen[0, h, t], count) for t in range(5)] for h in range(3)])
    assert_close(got[0], want.double(), 1e-7)
    assert (got[..., 0] <= got[..., 1] + 1e-12).all()
    assert count == 40 or error(wrong[0], want) > 1e-2  # control: other values


def test_a_row_of_one_weight_and_a_flat_row():
    _, v, _ = drawn()
    seen, one = torch.ones(1, 3, 5, 12, dtype=torch.bool), torch.zeros(1, 3, 5, 12, dtype=torch.float64)
    one[..., 4] = 1
    distance, bound, separable = row_measures(one, v, seen, chosen(one, seen, torch.tensor(1)))
    assert distance.eq(0).all() and bound.eq(0).all() and separable.eq(1).all()
    powers = torch.zeros(4, 2, dtype=torch.float64)  # sum p^2 = sum p^3 = 1
    assert softmax_norms(powers).eq(0).all()
    flat = torch.full_like(one, 1 / 12)
    _, bound, _ = row_measures(flat, v, seen, chosen(flat, seen, torch.tensor(3)))
    assert_close(bound, torch.full_like(bound, 0.75), FORMULA)
    wrong = row_measures(one, v, seen, chosen(one, seen, torch.tensor(3), "spread"))[2]
    assert (wrong < 1).all()  # control: other keys than the greatest


def test_keys_that_are_spread():
    seen = torch.tensor([True] * 4 + [False] * 2 + [True] * 4)[None, None, None]
    p = torch.rand(1, 1, 1, 10)
    for count in (1, 2, 3, 8, 20):
        found = chosen(p, seen, torch.tensor(count), "spread")
        assert int(found.sum()) == min(count, 8) and not (found & ~seen).any()
    assert chosen(p, seen, torch.tensor(2), "spread").nonzero()[:, -1].tolist() == [3, 9]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 14), st.floats(0.05, 4), st.sampled_from(sorted(NORMALIZERS)))
def test_the_bound_of_the_distance_holds(seed, count, temperature, kind):
    rule = NormalizationMeasures(normalizer=kind, k=5, trained=12).rule(temperature)
    p, v, seen = drawn(seed)
    p = rule(p.log(), seen)
    for how in ("top", "spread"):
        distance, bound, separable = row_measures(p, v, seen, chosen(p, seen, torch.tensor(count), how))
        assert (distance <= bound * (1 + 1e-9) + 1e-12).all()
        assert ((separable >= 0) & (separable <= 1)).all()


def test_sums_of_powers_of_a_call():
    kept = []
    with use(models.tiny("llama"), Keep(kept=kept)), torch.no_grad():
        models.forward("llama", models.tiny("llama"))
    call = kept[0][0]
    maps = torch.cat([rows for _, rows in manyheads.calls.weights.weights(call)], 2).double()
    got = measure(call, [LogPowerSum((2.0, 3.0, 0.5))], block=4)[0]
    want = torch.stack([maps.pow(a).sum(-1).log() for a in (2, 3, 0.5)], -1)
    assert_close(got, want, 8 * CLOSE)
    assert is_far(got[..., 0], want[..., 1], 8 * CLOSE)  # control: another power
    # As the kernels have it: weights to a power are, but for their sum, those of a larger scale.
    fused = torch.stack([call.replace(scale=a * call.scale).lse() - a * call.lse() for a in (2, 3, 0.5)], -1)
    some = maps.sum(-1) > 0
    assert_close(fused[some], want[some], 64 * CLOSE)


LENS = f"{SLUG}.measures:least=4,shares=0.25,counts=2,temperatures=1.0+0.5"


def look(name, *, spec=LENS, **inputs):
    model = models.tiny(name)
    with manyheads.watch(model, spec) as seen, torch.no_grad():
        model(**(inputs or models.inputs(name)))
    return seen.compute()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bert"])
def test_measures_of_a_model_are_those_of_its_maps(name):
    inputs = models.inputs(name, batch=1, length=40)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    found = look(name, **inputs)
    kept = []
    with use(models.tiny(name), Keep(kept=kept)), torch.no_grad():
        models.tiny(name)(**inputs)
    maps = dense.maps(dense.eager(name), **inputs)["self"]
    grid = sorted({round(2 ** (i / 2)) for i in range(4, 11)} & set(range(4, 41)))
    for layer, (p, (call, _)) in enumerate(zip(maps, kept, strict=True)):
        v, p = call.v.repeat_interleave(4 // call.v.shape[1], 1)[0].double(), p[0].double()
        bucket = {}
        for n in grid:
            for h in range(4):
                row = p[h, n - 1]
                seen = row > 0
                count = int(seen.sum())
                distance, _, apart = by_hand(row, v[h], seen, max(1, round(count / 4)))
                norm = float((row.diag() - row[:, None] * row).norm())
                bucket.setdefault(round(2 * np.log2(count)), []).append((distance, apart, norm, h))
        for i, table in enumerate(("distance", "separability", "sensitivity")):
            rows = [[np.mean([x[i] for x in of if x[3] == h]) for of in bucket.values()] for h in range(4)]
            want = np.mean(rows, 1)
            assert is_close(found.tables[table].values[0, layer], want, 1e-4), (table, layer)
            assert error(found.tables[table].values[0, 1 - layer], want) > 1e-3  # control: the other layer
    assert max(row["distance over its bound, greatest of all rows"] for row in found.records["tightest"]) < 1.0001
    assert list(found.curves) == ["distance", "separability", "beyond", "sensitivity"] and found.notes


def test_decoded_and_padded_rows_count_as_in_one_forward():
    model, ids = models.tiny("llama"), models.tokens(2, 33)
    whole = look("llama", input_ids=ids)
    with manyheads.watch(model, LENS) as seen, torch.no_grad():
        made = model(input_ids=ids[:, :20], use_cache=True)
        for t in range(20, 33):
            model(input_ids=ids[:, t : t + 1], past_key_values=made.past_key_values)
    for name, table in seen.compute().tables.items():
        assert is_close(table.values, whole.tables[name].values, 1e-4), name
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :7] = 0
    beside = look("llama", input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for name, table in beside.tables.items():
        assert is_close(table.values, whole.tables[name].values, 1e-4), name
    unmasked = look("llama", input_ids=padded)
    assert is_far(unmasked.tables["distance"].values, whole.tables["distance"].values, 1e-4)  # control


def test_every_row_and_other_normalizers():
    found = look("llama", spec=LENS + ",every_row=true", **models.inputs("llama", length=24))
    maps = dense.maps(dense.eager("llama"), **models.inputs("llama", length=24))["self"]
    real = models.inputs("llama", length=24)["attention_mask"].bool()
    p = torch.stack(maps).double()  # [L, B, H, T, S]
    a = p.square().sum(-1)
    norms = (a - 2 * p.pow(3).sum(-1) + a.square()).clamp(min=0).sqrt()
    want = torch.stack([norms[:, b][..., real[b]].mean(-1) for b in range(2)])
    assert is_close(found.tables["sensitivity of every row"].values, want.numpy(), 1e-4)
    assert is_far(found.tables["sensitivity of every row"].values, want.flip(1).numpy(), 1e-4)  # control
    other = look("llama", spec=LENS + ",normalizer=entmax15")
    assert other.tables["distance"].mean.mean() < look("llama").tables["distance"].mean.mean()
    short = look("llama", input_ids=models.tokens(1, 3))
    assert short.notes == ["No row sees 4 keys; give longer prompts."]


def test_heads_of_a_call_have_scales_of_their_own():
    kept = []
    with use(models.tiny("llama"), Keep(kept=kept)), torch.no_grad():
        models.forward("llama", models.tiny("llama"))
    call, rule = kept[0][0], Normalized().rule
    s = torch.tensor([0.1, 0.3, 0.5, 0.7])[:, None, None]
    got = normalized_attention(call, rule, s)
    for h in range(4):
        want = normalized_attention(call, replace(rule, s=float(s[h])))
        assert_close(got[:, :, h], want[:, :, h], SAME)
    assert error(got[:, :, 0], normalized_attention(call, replace(rule, s=0.7))[:, :, 0]) > 1e-3  # control
