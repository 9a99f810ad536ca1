# SPDX-License-Identifier: Apache-2.0
"""Temporal-aware dual RoPE and the frame-wise block causal mask on unmodified LLaVA against the formula."""

import pytest
import torch

import manyheads
from manyheads.attention.image_layout import ImageLayout
from manyheads.attention.positions import rope_tables
from manyheads.attention.rope import rotate
from tiny import vision
from tolerance import DEEP, SAME, assert_close, is_far

FRAME = (1, 3)
VIDEO = (2, FRAME, FRAME, 1, FRAME, 2)  # words between frames too
INDEX = list(range(14))
TIME = [0, 0, *[0] * 3, *[1] * 3, 2, *[2] * 3, 3, 3]
FRAMES = [-1, -1, *[0] * 3, *[1] * 3, -1, *[2] * 3, -1, -1]


@pytest.fixture(scope="module")
def model():
    return vision.llava()


def run(model, spec, parts=VIDEO, images=None, **more):
    frames = vision.pixels(sum(isinstance(p, tuple) for p in parts), *FRAME) if images is None else images
    with torch.no_grad(), manyheads.use(model, spec):
        return model(**vision.padded([vision.prompt(*parts)]), pixel_values=frames, **more)


@pytest.mark.parametrize("gamma", [1, 2.5])
def test_it_is_the_formula(model, gamma):
    positions = [n + gamma * t for n, t in zip(INDEX, TIME, strict=True)]
    mask = torch.tensor(
        [[j <= i or (a >= 0 and b >= 0 and b <= a) for j, b in enumerate(FRAMES)] for i, a in enumerate(FRAMES)]
    )
    ids, frames = vision.prompt(*VIDEO), vision.pixels(3, *FRAME)
    got = run(model, f"tc_llava:gamma={gamma}").logits[0]
    with torch.no_grad():
        want = vision.dense(model, ids, frames, positions, mask)
        plain = vision.dense(model, ids, frames, INDEX, mask)
        causal = vision.dense(model, ids, frames, positions, torch.ones_like(mask).tril())
    assert_close(got, want, SAME)
    assert is_far(plain, want, SAME) and is_far(causal, want, SAME)  # each part counts
    assert_close(run(model, f"tc_llava:gamma={gamma},mask=causal").logits[0], causal, SAME)


def test_without_time_and_with_one_token_a_frame_it_is_the_model_as_it_is(model):
    parts = (2, (1, 1), (1, 1), 2)
    given, frames = vision.padded([vision.prompt(*parts)]), vision.pixels(2, 1, 1)
    with torch.no_grad():
        plain = model(**given, pixel_values=frames).logits
    assert_close(run(model, "tc_llava:gamma=0", parts, frames).logits, plain, SAME)
    assert is_far(run(model, "tc_llava", parts, frames).logits, plain, SAME)


def test_two_rotations_are_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 14, 8, generator=generator, dtype=torch.float64)
    n, t = torch.tensor([INDEX]), torch.tensor([TIME])
    twice = x
    for at in (n, t):
        twice = rotate(twice, rope_tables(at, 8, dtype=torch.float64))
    once = rotate(x, rope_tables(n + t, 8, dtype=torch.float64))
    assert_close(twice, once, DEEP)
    assert is_far(rotate(x, rope_tables(n, 8, dtype=torch.float64)), once, DEEP)


def test_a_later_frame_changes_nothing_before_it(model):
    frames = vision.pixels(3, *FRAME)
    other = torch.cat([frames[:2], frames[2:] + 1])
    before, after = (run(model, "tc_llava", images=x).logits[0] for x in (frames, other))
    assert torch.equal(before[:9], after[:9]) and not torch.equal(before[9:], after[9:])
    leaky = [run(model, "tc_llava:mask=visual", images=x).logits[0] for x in (frames, other)]
    assert is_far(leaky[0][2:8], leaky[1][2:8], SAME)  # control: all frames see each other


def test_frames_read_turn_by_turn_are_those_read_at_once(model):
    frames, ids = vision.pixels(3, *FRAME), vision.prompt(*VIDEO)
    whole = run(model, "tc_llava").logits
    with torch.no_grad():
        with manyheads.use(model, "tc_llava"):
            first = model(input_ids=torch.tensor([ids[:8]]), pixel_values=frames[:2])
        with manyheads.use(model, "tc_llava"):  # another port goes on from the cache
            more = model(
                input_ids=torch.tensor([ids[8:13]]), pixel_values=frames[2:], past_key_values=first.past_key_values
            )
            last = model(input_ids=torch.tensor([ids[13:]]), past_key_values=more.past_key_values)
    assert_close(torch.cat([first.logits, more.logits, last.logits], 1), whole, SAME)


def test_positions_go_on_counting_from_any_shift():
    """Attention logits depend on differences alone: a prefix of words shifts n of all tokens and no t."""
    strategy = manyheads.parse("tc_llava")
    made = [
        strategy.position_ids(ImageLayout.of(torch.ones(1, 8 + shift, dtype=torch.bool), [(0, 1 + shift, 1, 3)]))[
            0, shift:
        ]
        for shift in (0, 5)
    ]
    assert torch.equal(made[1] - made[0], torch.full((8,), 5))


def test_axes_of_time_are_refused():
    with pytest.raises(manyheads.UserError, match="M-RoPE"), manyheads.use(vision.qwen(), "tc_llava"):
        pass
    with pytest.raises(manyheads.UserError, match="gamma"):
        manyheads.parse("tc_llava:gamma=-1")
