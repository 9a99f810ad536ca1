# SPDX-License-Identifier: Apache-2.0
"""Concentric causal attention on unmodified LLaVA and Qwen2-VL against positions and masks written out by hand."""

import pytest
import torch

import manyheads
from tiny import vision
from tolerance import SAME, assert_close, is_far

RINGS = torch.tensor([[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).flatten().tolist()  # of 3 x 5
SIZE = (3, 5)


@pytest.fixture(scope="module")
def model():
    return vision.llava()


def by_hand(parts):
    """Positions and mask of a row, token by token: (ring or None, image) of each."""
    tokens, positions, at, image = [], [], 0, 0
    for part in parts:
        if isinstance(part, tuple):
            tokens += [(ring, image) for ring in RINGS]
            positions += [at + ring for ring in RINGS]
            at, image = at + 2, image + 1
        else:
            tokens += [(None, -1)] * part
            positions += list(range(at, at + part))
            at += part
    mask = [
        [kr <= qr if qr is not None and qi == ki else j <= i for j, (kr, ki) in enumerate(tokens)]
        for i, (qr, qi) in enumerate(tokens)
    ]
    return positions, torch.tensor(mask)


ROWS = ((2, SIZE, 3), (1, SIZE, SIZE, 2), (4,), (SIZE, 1, SIZE, 1))


def run(model, rows, spec="concentric_attention", **more):
    count = sum(isinstance(part, tuple) for row in rows for part in row)
    images = {"pixel_values": vision.pixels(count, *SIZE)} if count else {}
    with torch.no_grad(), manyheads.use(model, spec):
        return model(**vision.padded([vision.prompt(*row) for row in rows]), **images, **more)


def test_a_batch_of_layouts_is_the_formula(model):
    logits, images = run(model, ROWS).logits, vision.pixels(5, *SIZE)
    used = 0
    for row, got in zip(ROWS, logits, strict=True):
        ids, own = vision.prompt(*row), sum(isinstance(part, tuple) for part in row)
        positions, mask = by_hand(row)
        given = images[used : used + own] if own else None
        with torch.no_grad():
            want = vision.dense(model, ids, given, positions, mask)
            assert_close(got[-len(ids) :], want, SAME)
            if own:
                raster = vision.dense(model, ids, given, range(len(ids)), mask)
                causal = vision.dense(model, ids, given, positions, torch.ones_like(mask).tril())
                assert is_far(raster, want, SAME) and is_far(causal, want, SAME)  # each part counts
        used += own


def test_reverse_raster_is_the_formula(model):
    row = (2, SIZE, 3)
    got = run(model, [row], "concentric_attention:positions=reverse,mask=reverse").logits[0]
    positions, mask = [0, 1, *range(16, 1, -1), 17, 18, 19], torch.ones(20, 20).tril().bool()
    mask[2:17, 2:17] = mask[2:17, 2:17].T.clone()
    with torch.no_grad():
        want = vision.dense(model, vision.prompt(*row), vision.pixels(1, *SIZE), positions, mask)
        plain = vision.dense(model, vision.prompt(*row), vision.pixels(1, *SIZE), range(20), mask)
    assert_close(got, want, SAME)
    assert is_far(plain, want, SAME)


@pytest.mark.parametrize("size", [None, (1, 1)])
def test_text_alone_and_an_image_of_one_patch_are_causal_attention(model, size):
    row = (3, size, 2) if size else (5,)
    given = vision.padded([vision.prompt(*row)])
    images = {"pixel_values": vision.pixels(1, 1, 1)} if size else {}
    with torch.no_grad():
        plain = model(**given, **images).logits
        with manyheads.use(model, "concentric_attention"):
            assert_close(model(**given, **images).logits, plain, SAME)


def test_raster_order_is_the_model_as_it_is(model):
    with torch.no_grad():
        plain = model(**vision.padded([vision.prompt(*r) for r in ROWS]), pixel_values=vision.pixels(5, *SIZE)).logits
    real = vision.padded([vision.prompt(*r) for r in ROWS])["attention_mask"].bool()
    assert_close(run(model, ROWS, "concentric_attention:positions=raster,mask=raster").logits[real], plain[real], SAME)
    assert is_far(run(model, ROWS).logits[real], plain[real], SAME)


def test_a_turned_image_looks_the_same_to_the_centre(model):
    """With no positions from the tower, a rotation changes no logit after the image; in raster order it does."""
    side = 4
    grid = torch.arange(side * side).view(side, side)
    features = model.model.get_image_features(vision.pixels(1, side, side)).pooler_output[0].detach()

    def logits(order, spec):
        moved = torch.nn.Parameter(torch.zeros(()))
        handle = model.model.multi_modal_projector.register_forward_hook(lambda *_: features[order][None] + moved)
        try:
            given = vision.padded([vision.prompt(2, (side, side), 3)])
            with torch.no_grad(), manyheads.use(model, spec):
                return model(**given, pixel_values=vision.pixels(1, side, side)).logits[0, -3:]
        finally:
            handle.remove()

    straight, turned = grid.flatten(), grid.rot90().flatten()
    assert_close(logits(turned, "concentric_attention"), logits(straight, "concentric_attention"), SAME)
    raster = "concentric_attention:positions=raster,mask=raster"
    assert is_far(logits(turned, raster), logits(straight, raster), SAME)


def test_decoding_is_reading_the_whole(model):
    rows = [[*vision.prompt(2, SIZE, 3)], [*vision.prompt(1, SIZE, 2)]]
    given, images = vision.padded(rows), vision.pixels(2, *SIZE)
    with torch.no_grad(), manyheads.use(model, "concentric_attention"):
        made = model.generate(**given, pixel_values=images, max_new_tokens=4, do_sample=False, output_logits=True,
                              return_dict_in_generate=True)  # fmt: skip
        whole = torch.cat([given["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
        full = model(input_ids=made.sequences, attention_mask=whole, pixel_values=images).logits[:, -5:-1]
    assert_close(torch.stack(made.logits, 1).double(), full, SAME)
    with torch.no_grad():
        plain = model(input_ids=made.sequences, attention_mask=whole, pixel_values=images).logits[:, -5:-1]
    assert is_far(full, plain, SAME)


def qwen_inputs(model, heights):
    """A prompt with images of these heights, 6 wide, in patches before they are merged by two."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.tensor([[1, height, 6] for height in heights])
    pixels = torch.randn(int(grids.prod(1).sum()), 3 * vision.PATCH**2, generator=generator, dtype=torch.float64)
    ids = vision.prompt(2, *(part for height in heights for part in ((height // 2, 3), 1)), 2)
    kinds = torch.tensor([[int(x == vision.IMAGE) for x in ids]])
    return {
        "input_ids": torch.tensor([ids]),
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "mm_token_type_ids": kinds,
    }


def test_all_axes_of_mrope_get_the_ring():
    model = vision.qwen()
    given = qwen_inputs(model, (4, 6))  # 2 x 3 patches: one ring; 3 x 3: two
    seen = {}
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.update(at=args[1]))
    with torch.no_grad(), manyheads.use(model, "concentric_attention"):
        made = model.generate(
            **given, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        whole = {**given, "input_ids": made.sequences}
        whole["mm_token_type_ids"] = (made.sequences == vision.IMAGE).int()
        full = model(**whole).logits[:, -4:-1]
    hook.remove()
    want = [0, 1, *[2] * 6, 3, 4, 4, 4, 4, 5, 4, 4, 4, 4, 6, 7, 8, 9, 10, 11]
    assert seen["at"].tolist() == [[want]] * 3
    assert_close(torch.stack(made.logits, 1).double(), full, SAME)
    with torch.no_grad():
        assert is_far(model(**whole).logits[:, -4:-1], full, SAME)


def test_gradients_flow_and_the_model_is_as_before(model):
    given = vision.padded([vision.prompt(2, SIZE, 3)])
    before = {name: id(x) for name, x in vars(model.model).items()}
    images = vision.pixels(1, *SIZE).requires_grad_()
    with manyheads.use(model, "concentric_attention"):
        model(**given, pixel_values=images).logits[0, -1].sum().backward()
    assert images.grad.abs().min() > 0
    assert {name: id(x) for name, x in vars(model.model).items()} == before
    assert type(model.model).__call__ is torch.nn.Module.__call__
    model.zero_grad()
