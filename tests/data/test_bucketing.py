# SPDX-License-Identifier: Apache-2.0
"""Batches by length: every recording once, bounds that hold, padding counted twice, nearly the largest batch."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads.data.bucketing import (
    Bucket,
    BucketSampler,
    assign,
    buckets,
    largest_batch,
    padding,
)
from manyheads.errors import UserError


def corpus(count=600, seed=0):
    """Durations of strings of words, and tokens that go with them loosely."""
    rng = np.random.default_rng(seed)
    durations = rng.lognormal(0.5, 0.6, count)
    return durations, np.maximum(1, np.round(durations * rng.uniform(2, 14, count)))


def drawn(sampler, number=0, skip=0):
    return list(sampler.epoch(number, skip))


@given(count=st.integers(1, 12), sub=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_recording_is_once_in_an_epoch_or_is_refused(count, sub, seed):
    durations, tokens = corpus(150, seed)
    among = buckets(durations, tokens, count, sub)
    assert among == sorted(among) and len(among) <= count * sub
    sampler = BucketSampler(durations, tokens, among, [1 + i % 7 for i in range(len(among))], seed)
    steps, (_, rejected) = drawn(sampler), sampler.members()
    assert sorted([i for _, batch in steps for i in batch] + rejected) == list(range(150))
    for bucket, batch in steps:
        assert 0 < len(batch) <= sampler.sizes[bucket]
        assert max(durations[batch]) <= among[bucket].duration and max(tokens[batch]) <= among[bucket].tokens
    for i in range(150):  # what fits strictly fits
        assert (
            assign(durations[i], tokens[i], among) is None
            or assign(durations[i], tokens[i], among, "lenient") is not None
        )


def test_sums_of_buckets_are_about_equal_by_hand():
    # 12 s in all, in two: 1 + 1 + 2 + 2 = 6, then 6.
    assert buckets([1, 1, 2, 2, 6], [1] * 5, 2, 1) == [Bucket(2, 1), Bucket(6, 1)]
    assert buckets([1, 1, 1, 1], [1, 1, 2, 4], 1, 2) == [Bucket(1, 2), Bucket(1, 4)]
    assert buckets([3], [5], 30, 2) == [Bucket(3, 5)]
    durations, tokens = corpus()
    bounds = sorted({bucket.duration for bucket in buckets(durations, tokens, 8, 1)})
    pairs = pairwise([0, *bounds])
    sums = [durations[(durations > low) & (durations <= high)].sum() for low, high in pairs]
    assert max(sums) - min(sums) <= 2 * durations.max()
    with pytest.raises(UserError, match="above 0"):
        buckets([1, 0], [1, 1])


def test_the_last_recording_counts_and_an_outlier_does_not():
    durations, tokens = np.full(101, 2.0), np.full(101, 10.0)
    tokens[:50] += 1
    assert buckets(durations, tokens, 1, 1) == [Bucket(2, 11)]  # the one that released code leaves out
    tokens[100] = 400.0
    among = buckets(durations, tokens, 1, 1)
    assert among == [Bucket(2, 11)] and assign(2.0, 400.0, among) is None
    few = buckets(durations[90:], tokens[90:], 1, 1)
    assert few == [Bucket(2, 400)]  # control: among eleven no z-score is above 4


def test_strict_and_lenient():
    among = [Bucket(1, 5), Bucket(1, 9), Bucket(2, 20)]
    for duration, tokens, strict, lenient in (
        (0.5, 5, 0, 0),
        (1, 6, 1, 1),
        (1, 12, None, 2),
        (2, 3, 2, 2),
        (3, 1, None, None),
    ):
        assert assign(duration, tokens, among) == strict and assign(duration, tokens, among, "lenient") == lenient


def test_padding_is_that_of_the_tensors():
    durations, tokens = corpus(90)
    lengths, counts = (100 * durations).astype(int) + 1, tokens.astype(int)
    rng = np.random.default_rng(1)
    batches = [list(part) for part in np.array_split(rng.permutation(90), 11)]
    found = padding(lengths, counts, batches)
    for share, values in ((found.inputs, lengths), (found.outputs, counts)):
        masks = [np.arange(values[b].max())[None] < values[b][:, None] for b in batches]
        assert math.isclose(share, 1 - sum(m.sum() for m in masks) / sum(m.size for m in masks))
    assert found.batches == 11 and math.isclose(found.size, 90 / 11)


def test_a_bucket_for_each_length_has_no_padding_and_one_is_random():
    durations = np.repeat(np.arange(1.0, 9.0), 20)
    tokens = durations * 3
    lengths = sorted(set(durations))
    exact = [Bucket(d, 3 * d) for d in lengths]
    found = padding(durations, tokens, [b for _, b in drawn(BucketSampler(durations, tokens, exact, [8] * 8))])
    assert found.inputs == found.outputs == 0
    one = BucketSampler(durations, tokens, buckets(durations, tokens, 1, 1), [8])
    shares = [padding(durations, tokens, [b for _, b in drawn(one, n)]).inputs for n in range(200)]
    rng = np.random.default_rng(0)
    plain = [padding(durations, tokens, np.array_split(rng.permutation(160), 20)).inputs for _ in range(200)]
    assert abs(np.mean(shares) - np.mean(plain)) < 4 * np.std(plain) / 200**0.5 * 2**0.5


def test_buckets_of_two_dimensions_waste_less_than_of_one_and_random_most():
    durations, tokens = corpus(6000)

    def wasted(count, sub):
        among = buckets(durations, tokens, count, sub)
        return padding(
            durations, tokens, [b for _, b in drawn(BucketSampler(durations, tokens, among, [16] * len(among)))]
        )

    random, one, two = wasted(1, 1), wasted(10, 1), wasted(10, 3)
    assert random.inputs > 0.5 and one.inputs < 0.25 * random.inputs
    assert two.outputs < 0.8 * one.outputs and one.outputs < random.outputs


@pytest.mark.parametrize("world", [2, 3])
def test_processes_agree_on_buckets_and_share_nothing(world):
    durations, tokens = corpus(301)
    among = buckets(durations, tokens, 5, 2)
    all_steps = [
        drawn(BucketSampler(durations, tokens, among, [4] * len(among), 7, rank, world), 3) for rank in range(world)
    ]
    assert len({tuple(bucket for bucket, _ in steps) for steps in all_steps}) == 1
    seen = [i for steps in all_steps for _, batch in steps for i in batch]
    assert len(seen) == len(set(seen)) and all(len(batch) <= 4 for steps in all_steps for _, batch in steps)
    for step in zip(*all_steps, strict=True):
        assert max(len(b) for _, b in step) - min(len(b) for _, b in step) <= 1


def test_an_epoch_goes_on_and_another_has_another_order():
    durations, tokens = corpus(200)
    among = buckets(durations, tokens, 4, 2)
    sampler = BucketSampler(durations, tokens, among, [8] * len(among))
    whole = drawn(sampler)
    assert drawn(sampler, skip=5) == whole[5:] and drawn(sampler) == whole and drawn(sampler, 1) != whole


@given(base=st.integers(0, 50), each=st.integers(1, 40), cap=st.integers(100, 20000), start=st.integers(1, 64))
def test_the_largest_batch_is_nearly_the_most_that_fits(base, each, cap, start):
    asked = []

    def fits(size):
        asked.append(size)
        return base + each * size <= cap

    most = (cap - base) // each
    found = largest_batch(fits, start)
    assert most >= found >= most * 0.95 - 1 and len(asked) <= 3 * math.log2(cap + 64) + 4
    with pytest.raises(UserError, match="not even"):
        largest_batch(lambda size: False, start)
