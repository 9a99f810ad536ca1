# SPDX-License-Identifier: Apache-2.0
"""VCD and PAI against their formulas over a dense decoder, token by token."""

import pytest
import torch

import manyheads
from manyheads import parse
from manyheads.decoding._images import plausible
from manyheads.decoding.vcd import noisy
from manyheads.integrations.decoding import write
from manyheads.writing import Request
from tiny import vision
from tolerance import CLOSE, assert_close, is_far, nearly, spread_error

PROMPT = vision.prompt(2, (4, 4), 5)
MOST = 5


@pytest.fixture(scope="module")
def model():
    return vision.llava()


@pytest.fixture(scope="module")
def request_(model):
    return Request(model, None, torch.tensor([PROMPT]), MOST, seed=3, given={"pixel_values": vision.pixels(1, 4, 4)})


def written(model, combine):
    """Greedy by ``combine`` of a text so far, from whole forwards without a cache."""
    ids = list(PROMPT)
    for _ in range(MOST):
        ids.append(int(combine(ids).argmax()))
    return ids[len(PROMPT) :]


def last(model, ids, pixels, hidden=False):
    allowed = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    if hidden:
        allowed &= torch.tensor(ids) != vision.IMAGE
    return vision.dense(model, ids, pixels, range(len(ids)), allowed)[-1]


def test_noise_keeps_the_variance_and_grows():
    pixels = torch.ones(1, 3, 40, 40)
    found = [noisy(pixels, step, torch.Generator().manual_seed(0)) for step in (0, 500, 1000)]
    assert torch.equal(found[0], pixels)
    means = [float(x.mean()) for x in found]
    assert means[0] > means[1] > means[2] > 0
    betas = (torch.linspace(-6, 6, 1000).double().sigmoid() * (0.5e-2 - 1e-5) + 1e-5)[:500]
    kept = float((1 - betas).prod())
    assert spread_error(float(found[1].std()), (1 - kept) ** 0.5, pixels.numel()) < 2
    assert spread_error(float(found[1].std()), 1 - kept, pixels.numel()) > 3  # control


def test_plausible_tokens_are_those_near_the_likeliest():
    by = torch.tensor([0.0, -1.0, -3.0]).double()
    assert plausible(torch.zeros(3).double(), by, 0.1).isfinite().tolist() == [True, True, False]
    assert plausible(torch.zeros(3).double(), by, 0.0).isfinite().all()


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_vcd_is_its_formula(model, request_, alpha):
    pixels = request_.given["pixel_values"]
    dull = noisy(pixels, 500, request_.generator())

    def combine(ids):
        clear = last(model, ids, pixels)
        return plausible((1 + alpha) * clear - alpha * last(model, ids, dull), clear, 0.1)

    assert write(parse(f"vcd:alpha={alpha}"), request_).tokens == written(model, combine)
    assert write(parse("vcd:alpha=0"), request_).tokens == written(model, lambda ids: last(model, ids, pixels))


def test_pai_contrasts_with_text_alone(model, request_):
    pixels = request_.given["pixel_values"]

    def combine(ids):
        both = last(model, ids, pixels)
        alone = last(model, ids, pixels, hidden=True)
        return 4 * both.log_softmax(0) - 3 * alone.log_softmax(0)

    plain = written(model, lambda ids: last(model, ids, pixels))
    assert write(parse("pai:alpha=0,gamma=4,beta=0,start_layer=0"), request_).tokens == written(model, combine) != plain
    assert write(parse("pai:alpha=0,gamma=1,start_layer=0"), request_).tokens == plain


def test_pai_amplifies_by_the_size_of_the_logit(model, request_):
    strategy = parse("pai:alpha=0.5")
    scores = torch.tensor([[[2.0, -4.0, 1.0, -torch.inf]]]).double()
    added = strategy.shift(scores, torch.tensor([True, True, False, True]), None)
    assert added[0, 0].tolist() == nearly([1.0, 2.0, 0.0, 0.0])
    made = write(parse("pai:alpha=2,gamma=1,start_layer=0"), request_).tokens
    with manyheads.use(model, "pai:alpha=2,start_layer=0,columns=2-17"):
        whole = model.generate(input_ids=request_.ids, **request_.given, max_new_tokens=MOST, do_sample=False)
    assert made == whole[0, len(PROMPT) :].tolist()
    assert made != write(parse("pai:alpha=0,gamma=1,start_layer=0"), request_).tokens


def test_only_the_first_reading_is_amplified(model, request_):
    from manyheads.decoding._images import Switch, Switched
    from manyheads.integrations.streams import Streams

    inner = parse("pai:alpha=2,start_layer=0,columns=2-17")
    switch, ones = Switch(), torch.ones(2, len(PROMPT), dtype=torch.bool)
    with manyheads.use(model, Switched(inner=inner, switch=switch)), torch.inference_mode():
        streams = Streams(model, request_.ids, ones, [request_.given] * 2)
        before = streams.next()
        switch.on = True
        after = streams.again()
    assert_close(after[1], before[1], CLOSE)
    assert is_far(after[0], before[0], CLOSE)
