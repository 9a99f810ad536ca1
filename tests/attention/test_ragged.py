# SPDX-License-Identifier: Apache-2.0
"""Ragged storage against padded: the same tokens, the same attention, whatever the lengths, padding and codec."""

import copy

import pytest
import torch

from manyheads import UserError
from manyheads.attention import reference
from manyheads.attention.codec import KVCodec, kv_codec
from manyheads.attention.padded import PaddedCache
from manyheads.attention.ragged import RaggedCache, pack
from tolerance import CLOSE, assert_close

B, HEADS, D = 2, 2, 8
INT4, K8V4, FP8 = (kv_codec(name) for name in ("int4", "k8v4", "fp8"))
CODECS = {"raw": (None, 0), "int4": (INT4, 4), "k8v4": (K8V4, 4), "fp8": (FP8, 4), "int4 without a ring": (INT4, 0)}
codecs = pytest.mark.parametrize(("codec", "window"), CODECS.values(), ids=CODECS)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slots(length=12, padding=(0, 3), ragged=True, seed=0):
    """Slots of two rows, one of them padded on the left, whose heads have dropped different tokens."""
    k, v = random(B, HEADS, length, D, seed=seed), random(B, HEADS, length, D, seed=seed + 1)
    made = PaddedCache.empty(k, v)
    made.update(k, v)
    if any(padding):
        made.mark(torch.arange(length) >= torch.tensor(padding)[:, None])
    if ragged:
        kept = random(B, HEADS, length, seed=seed + 2) > -0.2
        kept[..., -4:] = True
        order = torch.where(kept, torch.arange(length), length).argsort(dim=-1, stable=True)
        made.keep(order, kept.gather(2, order))
    return made


def quantised(x, codec):
    return x if codec is None else codec.decode(*codec.encode(x), x.dtype)


def expected(held, q, codec, window, key_scale=None):
    """Attention of ``q [B, H, d]`` over slots, all but the newest and ``window`` before it as the codec gives
    them back.
    """
    positions, counts = held.positions(), held.counts() - 1
    old = ((positions < (counts - window)[:, None, None]) & (positions >= 0))[..., None]
    factor = 1.0 if key_scale is None else key_scale[:, :, None]
    keys, values = (None, None) if codec is None else (codec.keys, codec.values)
    k = torch.where(old, quantised(held.keys * factor, keys) / factor, held.keys)
    v = torch.where(old, quantised(held.values, values), held.values)
    mask = reference.repeat_kv((positions >= 0)[:, :, None], q.shape[1])
    return reference.attention(q[:, :, None].double(), k.double(), v.double(), scale=0.3, mask=mask)


def token(heads=4, seed=5):
    """q, k and v of one token."""
    return tuple(random(B, n, 1, D, seed=seed + i) for i, n in enumerate((heads, HEADS, HEADS)))


@codecs
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize("padding", [(0, 0), (0, 3)])
@pytest.mark.parametrize("scaled", [False, True])
def test_attends_as_slots_do(codec, window, heads, padding, scaled):
    held, (q, k, v) = slots(padding=padding), token(heads)
    factors = random(B, HEADS, D, seed=9).exp() if scaled and codec else None
    flat = pack(copy.deepcopy(held), codec=codec, window=window, key_scale=factors, room=3)
    held.update(k, v)
    assert_close(flat.decode(q, k, v, 0.3), expected(held, q[:, :, 0], codec, window, factors), CLOSE)


@codecs
def test_control_of_attending(codec, window):
    held, (q, k, v) = slots(), token()
    flat = pack(copy.deepcopy(held), codec=codec, window=window)
    held.update(k, v)
    flat.lengths -= 1
    with pytest.raises(AssertionError):
        assert_close(flat.decode(q, k, v, 0.3), expected(held, q[:, :, 0], codec, window), CLOSE)


def test_control_of_which_codec_is_whose():
    """Codecs of keys and values exchanged give other numbers, and so does one codec for both."""
    held, (q, k, v) = slots(), token()
    flat = pack(copy.deepcopy(held), codec=K8V4, window=4)
    held.update(k, v)
    got = flat.decode(q, k, v, 0.3)
    assert_close(got, expected(held, q[:, :, 0], K8V4, 4), CLOSE)
    for wrong in (KVCodec("v8k4", K8V4.values, K8V4.keys), INT4, FP8):
        with pytest.raises(AssertionError):
            assert_close(got, expected(held, q[:, :, 0], wrong, 4), CLOSE)


@codecs
@pytest.mark.parametrize("ragged", [False, True])
def test_decoding_equals_slots(codec, window, ragged):
    """Twelve tokens one by one, a padding token among them; then the same back in slots."""
    values = None if codec is None else codec.values
    held = slots(ragged=ragged, padding=(0, 3) if ragged else (0, 0))
    flat = pack(copy.deepcopy(held), codec=codec, window=window, room=12)
    for t in range(12):
        q, k, v = token(seed=20 + 3 * t)
        real = torch.tensor([True, t != 5]) if ragged else None
        held.update(k, v)
        if real is not None:
            held.mark(real[:, None])
        here = slice(None) if real is None else real  # what a padding token sees means nothing
        want = expected(held, q[:, :, 0], codec, window)[here]
        assert_close(flat.decode(q, k, v, 0.3, real)[here], want, CLOSE)
    assert flat.room == 0
    back = flat.unpack()
    assert back.seen == held.seen
    for row in range(B):
        for head in range(HEADS):
            columns = held.columns()[row, head]
            want = columns[columns >= 0]
            got = back._raw[row, head]
            assert got[got >= 0].tolist() == want.tolist()
            assert_close(
                quantised(back.values[row, head][got >= 0], values),
                quantised(held.values[row, head][columns >= 0], values),
            )


def test_past_its_end_fixed_storage_raises():
    flat = pack(slots(padding=(0, 0), ragged=False), room=2)
    flat.fix()
    flat.decode(*token(), 0.3)
    flat.decode(*token(), 0.3)
    with pytest.raises(IndexError):
        flat.decode(*token(), 0.3)


@pytest.mark.parametrize("codec", [INT4, K8V4, FP8], ids=lambda c: c.name)
def test_codes_are_made_once(codec):
    """Old codes are the same bytes after many more tokens, and after going back to slots and into storage again."""
    held = slots(length=20, padding=(0, 0), ragged=False)
    flat = pack(held, codec=codec, window=4, room=40)
    first = [flat.k.view(torch.uint8)[:16].clone(), flat.k_scale[:16].clone(), flat.v.view(torch.uint8)[:16].clone()]

    def old(storage: RaggedCache):
        return [storage.k.view(torch.uint8)[:16], storage.k_scale[:16], storage.v.view(torch.uint8)[:16]]

    for t in range(30):
        flat.decode(*token(seed=t), 0.3)
        if t % 10 == 9:
            flat = pack(flat.unpack(), codec=codec, window=4, room=40)
    assert all(torch.equal(x, y) for x, y in zip(old(flat), first, strict=True))
    # Control: made from what the codes gave back in bfloat16 and under another factor they would differ.
    again = codec.keys.encode((codec.keys.decode(flat.k[:16], flat.k_scale[:16], torch.float32) * 1.3).bfloat16())[1]
    assert not torch.equal(again, first[1])


def test_bytes_fall_with_every_token_that_goes():
    even, uneven = slots(length=40, padding=(0, 0), ragged=False), slots(length=40, padding=(0, 0))
    filled = int((uneven.columns() >= 0).sum())
    for held, tokens in ((even, B * HEADS * 40), (uneven, filled)):
        flat = pack(held, room=1)
        planes = flat.k.untyped_storage().nbytes() + flat.v.untyped_storage().nbytes()
        assert planes == (tokens + B * HEADS) * 2 * D * 4
    for codec, key, value in ((INT4, D // 2, D // 2), (K8V4, D, D // 2), (FP8, D, D)):
        packed = pack(slots(length=40, padding=(0, 0), ragged=False), codec=codec, window=4, room=1)
        assert (packed.k.nbytes, packed.v.nbytes) == tuple(B * HEADS * (36 + 1) * width for width in (key, value))
    assert packed.k_scale.nbytes + packed.v_scale.nbytes == B * HEADS * (36 + 1) * 4


def test_the_window_has_to_be_whole():
    held = slots(length=12, padding=(0, 0), ragged=False)
    order = torch.arange(11).expand(B, HEADS, -1)
    held.keep(order, torch.ones_like(order, dtype=torch.bool))
    with pytest.raises(UserError, match="recent=4"):
        pack(held, codec=INT4, window=4)


def test_poison_outside_of_the_lengths_is_never_read():
    flat, other = pack(slots(), room=5), pack(slots(), room=5)
    used = torch.zeros(flat.k.shape[0], dtype=torch.bool)
    for start, length in zip(flat.offsets.flatten().tolist(), flat.lengths.flatten().tolist(), strict=True):
        used[start : start + length] = True
    flat.k[~used], flat.v[~used] = torch.nan, torch.nan
    assert torch.equal(flat.decode(*token(), 0.3), other.decode(*token(), 0.3))
