# SPDX-License-Identifier: Apache-2.0
"""Readings against a dense decoder in float64, the game's identities, the shift's mass, gates that change nothing."""

import math
from dataclasses import replace

import pytest
import torch
import transformers

import manyheads
from manyheads import UserError, parse
from manyheads.attention import reference
from manyheads.decoding.conscious_gaze import calibrated, dividends, sensed, toward
from manyheads.decoding.conscious_gaze.steering import chosen_layers
from manyheads.integrations.decoding import write
from manyheads.integrations.streams import Streams, image_columns
from manyheads.strategy import AttentionWatch
from manyheads.writing import Request
from tiny import vision
from tiny.compare import tiny
from tolerance import DEEP, FORMULA, SAME, assert_close, is_close, is_far, nearly

PROMPT = vision.prompt(2, (4, 4), 5)
IMAGE = torch.tensor(PROMPT) == vision.IMAGE
COLUMNS = "2-17"
MOST = 6


@pytest.fixture(scope="module")
def model():
    return vision.llava(num_hidden_layers=3)


@pytest.fixture(scope="module")
def request_(model):
    return Request(model, None, torch.tensor([PROMPT]), MOST, given={"pixel_values": vision.pixels(1, 4, 4)})


def scores(heads=4, size=12, seed=0):
    return 2 * torch.randn(2, heads, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mass(x, image):
    return x.softmax(-1)[..., image].sum(-1)


# The game.


def test_dividends_sum_to_the_value_of_both_and_say_what_is_together():
    values = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = dividends(values)
    assert_close(found.sum(0), values[0], FORMULA)
    assert is_far(found[:3].sum(0), values[0], FORMULA)  # without v(0)
    both = torch.tensor([[1.0], [0.0], [0.0], [0.0]]).double()  # an AND of the two
    assert dividends(both)[:, 0].tolist() == [1, 0, 0, 0]
    assert dividends(torch.tensor([[1.0], [1.0], [1.0], [0.0]]).double())[0, 0] == -1  # an OR


def test_what_adds_up_is_not_sensed():
    image, text, none = torch.randn(3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    streams = torch.stack([none + image + text, none + image, none + text, none])
    # Probabilities are normalised in each reading: the dividend is one constant over all tokens then.
    assert sensed(streams, 10).variance < 1e-20
    streams[0, 3] += 1.0
    assert sensed(streams, 30).variance > 0.01
    top = streams[0].topk(10).indices
    want = (streams.log_softmax(-1)[:, top] * torch.tensor([1, -1, -1, 1.0])[:, None]).sum(0)
    assert sensed(streams, 10).variance == nearly(float(want.var(correction=0)))
    assert sensed(streams, 10).variance != nearly(float(want.var()))  # control


# The shift.


@pytest.mark.parametrize("shape", [0.0, 0.5])
def test_every_head_below_the_target_gets_it_exactly_and_no_other_changes(shape):
    x, image = scores(), torch.arange(12) < 5
    x[0, 0, :5] += 6
    x[1, :, 2] = -torch.inf  # hidden
    target = 0.4
    added = toward(x, image, target, shape)
    before, after = mass(x, image), mass(x + added, image)
    low = before < target
    assert 0 < int(low.sum()) < low.numel()
    assert_close(after[low], torch.full_like(after[low], target), FORMULA)
    assert torch.equal(after[~low], before[~low])
    assert (added[..., 5:] == 0).all()  # text against text stays
    assert is_far(mass(x + added.clamp(max=1.0), image)[low], after[low], FORMULA)  # control: shifted by less
    assert_close((x + added).softmax(-1).sum(-1), 1.0, FORMULA)


def test_the_consensus_is_that_of_heads_within_the_image():
    x, image = scores(), torch.arange(12) < 5
    w = x[..., :5].softmax(-1).mean(1, keepdim=True)
    added = toward(x, image, 0.9, 0.5)[..., :5]
    want = 0.5 * (5 * w).log()
    low = mass(x, image) < 0.9
    for found, wanted, ok in ((added, want, True), (added, 0.5 * want, False)):
        gap = (found - wanted)[low]
        assert is_close(gap - gap.mean(-1, keepdim=True), torch.zeros_like(gap), 4 * FORMULA, unit=1.0) == ok


def test_mass_grows_with_the_target_and_a_hidden_image_stays_hidden():
    x, image = scores(), torch.arange(12) < 5
    grown = [mass(x + toward(x, image, m), image).mean() for m in (0.1, 0.3, 0.6, 0.9)]
    assert grown == sorted(grown) and grown[0] < grown[-1]
    x[..., :5] = -torch.inf
    assert (toward(x, image, 0.5) == 0).all()


def test_sinks_take_mass_too():
    x, image, sinks = scores(heads=2), torch.arange(12) < 5, torch.tensor([3.0, 4.0]).double()

    def share(sinks, added):
        return reference.softmax((x + added)[:, :, None], sinks=sinks)[:, :, 0, :5].sum(-1)

    assert_close(share(sinks, toward(x, image, 0.5, sinks=sinks)), 0.5, FORMULA)
    assert is_far(share(sinks, toward(x, image, 0.5)), 0.5, FORMULA)


def test_layers_are_a_third_in_the_middle_or_as_many_at_the_end():
    assert list(chosen_layers(32, "middle")) == list(range(10, 22))
    assert list(chosen_layers(32, "last")) == list(range(20, 32))
    assert [list(chosen_layers(n, "middle")) for n in (1, 2, 3, 4)] == [[0], [0, 1], [1, 2], [1, 2]]


# On a model.


def test_readings_are_the_model_with_columns_hidden(model, request_):
    strategy = parse("conscious_gaze:head=2,tail=1")
    seen = strategy.players(IMAGE)
    assert seen.sum(1).tolist() == [23, 19, 7, 3]
    with torch.inference_mode():
        streams = Streams(model, request_.ids, seen, [request_.given] * 4)
        first, again = streams.next(), streams.again()
        assert torch.equal(first, again)
        streams.append(7, torch.tensor([True, False, True, False]))
        second = streams.next()
    more = torch.cat([seen, torch.tensor([True, False, True, False])[:, None]], 1)
    for row in range(4):
        for found, ids, columns in ((first, PROMPT, seen[row]), (second, [*PROMPT, 7], more[row])):
            allowed = torch.ones(len(ids), len(ids), dtype=torch.bool).tril() & columns
            pixels = request_.given["pixel_values"]
            want = vision.dense(model, ids, pixels, range(len(ids)), allowed)[-1]
            assert_close(found[row].double(), want, SAME)
            plain = vision.dense(model, ids, pixels, range(len(ids)), torch.ones_like(allowed).tril())[-1]
            assert row == 0 or is_far(found[row].double(), plain, SAME)


def test_the_shift_in_a_model_gives_the_mass_in_the_chosen_layers(model, request_):
    found = {}

    class Watch(AttentionWatch):
        def selects(self, site):
            return site.causal

        def watch(self, call, out):
            x = reference.logits(call.q, call.k, scale=call.scale, bias=call.bias)
            allowed = call.allowed()
            x = x if allowed is None else x.masked_fill(~allowed, -torch.inf)
            found[call.site.layer] = x.softmax(-1)[..., IMAGE].sum(-1)

    inputs = {"input_ids": request_.ids, **request_.given, "use_cache": False}
    with torch.inference_mode():
        with manyheads.use(model, Watch()):
            model(**inputs)
        plain = dict(found)
        with manyheads.use(model, f"conscious_gaze.steering:columns={COLUMNS},target=0.7", Watch()):
            model(**inputs)
    assert bool((plain[1][0, :, -1] < 0.7).any())
    for layer in (1, 2):
        assert bool((found[layer][0, :, -1] > 0.7 - 1e-6).all()), layer
    low = plain[1][0, :, -1] < 0.7
    assert_close(found[1][0, low, -1], torch.tensor(0.7, dtype=torch.float64), DEEP)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1][..., :-1], plain[1][..., :-1])


def greedy(model, request, *strategies):
    with manyheads.use(model, *strategies):
        made = model.generate(input_ids=request.ids, **request.given, max_new_tokens=MOST, do_sample=False)
    return made[0, request.ids.shape[1] :].tolist()


def test_gates_that_stay_shut_write_what_the_model_writes(model, request_):
    plain = greedy(model, request_)
    for spec in ("gate=never", "threshold=1e9", "gate=entropy,threshold=1e9", "gate=random,rate=0", "warmup=99"):
        made = write(parse(f"conscious_gaze:target=0.9,{spec}"), request_)
        assert made.tokens == plain and made.notes["intervened"] == 0 and made.forwards == MOST, spec
    open_ = [write(parse(f"conscious_gaze:target=0.9,{s}"), request_) for s in ("threshold=-1", "gate=random,rate=1")]
    always = write(parse("conscious_gaze:target=0.9,gate=always"), request_)
    assert [x.tokens for x in open_] == [always.tokens] * 2 != [plain] * 2
    assert [x.forwards for x in (*open_, always)] == [2 * MOST, MOST, MOST]
    assert always.tokens == greedy(model, request_, f"conscious_gaze.steering:columns={COLUMNS},target=0.9")
    assert vars(model.model.language_model.layers[1].self_attn).get("_manyheads") is None  # the port is shut again


@pytest.mark.parametrize(("make", "tokens", "shape"), [("smolvlm", 4, (1, 1)), ("internvl", 16, (1,))])
def test_other_models_that_read_images_write_too(make, tokens, shape):
    model, pixels = getattr(vision, make)(), vision.pixels(1, 8, 8).reshape(*shape, 3, 16, 16)
    ids = torch.tensor([vision.prompt(2, (1, tokens), 3)])
    asked = Request(model, None, ids, MOST, given={"pixel_values": pixels})
    plain = greedy(model, asked)
    shut, raised = (
        write(parse(f"conscious_gaze:{x}"), asked).tokens for x in ("threshold=1e9", "gate=always,target=0.9")
    )
    assert shut == plain != raised


def test_a_gate_opens_above_its_threshold_and_a_running_quantile(model, request_):
    shut = write(parse("conscious_gaze:threshold=1e9"), request_).notes["sensed"]
    between = sorted(shut)[2]
    made = write(parse(f"conscious_gaze:threshold={between}"), request_).notes
    assert made["opened"] == [x > between for x in made["sensed"]] and any(made["opened"])
    running = write(parse("conscious_gaze:warmup=2,quantile=0.5"), request_).notes
    past = running["sensed"]
    want = [
        t >= 2 and value > float(torch.tensor(past[:t]).quantile(0.5)) if t else False for t, value in enumerate(past)
    ]
    assert running["opened"] == want and any(want)
    set_ = calibrated(parse("conscious_gaze:quantile=0.5"), [request_], write)
    assert set_.threshold == nearly(float(torch.tensor(shut, dtype=torch.float64).quantile(0.5)))
    assert set_.threshold != nearly(max(shut))


def test_draws_follow_their_seed(model, request_):
    strategy = parse("conscious_gaze:temperature=3,gate=random,rate=0.5")
    made = [write(strategy, replace(request_, seed=s)) for s in (0, 0, 1)]
    assert made[0] == made[1] and made[0].tokens != made[2].tokens


def test_ends_are_no_part_of_the_text(model, request_):
    plain = write(parse("conscious_gaze:gate=never"), request_).tokens
    cut = write(parse("conscious_gaze"), replace(request_, ends=frozenset({plain[2]})))
    assert cut.tokens == plain[: plain.index(plain[2])]


@pytest.mark.parametrize("spec", ["conscious_gaze", "vcd", "pai:start_layer=0"])
def test_models_and_prompts_that_do_not_fit_are_refused(model, spec):
    words, pixels = torch.tensor([[3, 4, 5]]), {"pixel_values": vision.pixels(1, 4, 4)}
    strategy = parse(spec)
    with pytest.raises(UserError, match="no image in the prompt"):
        write(strategy, Request(model, None, words, 2))
    with pytest.raises(UserError, match="reads none"):
        write(strategy, Request(tiny(), None, words, 2))
    with pytest.raises(UserError, match="M-RoPE"):
        write(strategy, Request(vision.qwen(), None, words, 2))
    two = Request(model, None, torch.tensor([PROMPT] * 2), 2, given=pixels)
    with pytest.raises(UserError, match="one prompt at a time"):
        write(strategy, two)
    if spec != "vcd":
        bare = replace(two, ids=torch.tensor([PROMPT[2:]]))
        with pytest.raises(UserError, match="begins with one"):
            write(strategy, bare)
    with pytest.raises(UserError, match="chooses what is written"), manyheads.use(model, "conscious_gaze"):
        pass


def test_fields_out_of_range_are_refused(model):
    for wrong in ("target=1", "shape=-1", "candidates=1", "quantile=2", "rate=-1", "head=0", "temperature=-1"):
        with pytest.raises(UserError, match=wrong.split("=")[0]):
            parse(f"conscious_gaze:{wrong}")
    for wrong in ("vcd:noise=2000", "pai:gamma=0.5"):
        with pytest.raises(UserError, match=wrong.split(":")[1].split("=")[0]):
            parse(wrong)
    with pytest.raises(UserError, match="say which columns"), manyheads.use(model, "conscious_gaze.steering"):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    with pytest.raises(UserError, match="no threshold"):
        calibrated(parse("conscious_gaze:gate=always"), [], write)


def test_image_columns_are_found(model):
    assert torch.equal(image_columns(model, torch.tensor([PROMPT]), "x"), IMAGE)
    assert math.isclose(float(IMAGE.sum()), 16)


def test_a_token_is_read_anew_beside_sliding_windows():
    """Whose cache forgets: what goes back to before a token is what was there, and no more is kept than before."""
    model = vision.llava(decoder=transformers.MistralConfig, sliding_window=6)
    ids, everyone = torch.tensor([PROMPT]), torch.ones(2, dtype=torch.bool)
    seen = torch.stack([torch.ones_like(IMAGE), ~IMAGE])
    given = {"pixel_values": vision.pixels(1, 4, 4)}

    def read(anew):
        with torch.inference_mode():
            streams, found = Streams(model, ids, seen, [given] * 2), []
            for i in range(9):
                first = streams.next()
                assert i not in anew or torch.equal(first, streams.again())
                found.append(first)
                streams.append(5 + i, everyone)
        cache = next(iter(streams._cache.values()))
        return torch.stack(found), [layer.keys.shape[2] for layer in cache.layers]

    plain, held = read(())
    for anew in ((2,), (3, 7, 8), range(9)):
        found, more = read(anew)
        assert torch.equal(found, plain) and max(more) <= max(held) + 1 < 9
