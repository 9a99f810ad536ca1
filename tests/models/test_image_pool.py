# SPDX-License-Identifier: Apache-2.0
"""Texts of a pool read what the model reads of the images themselves, as each strategy places them."""

from contextlib import nullcontext

import pytest
import torch

import manyheads
from manyheads.models import joined_vlm
from manyheads.models.image_pool import ImagePool, fit_projector, image_features, orders
from manyheads.recipes.joined_vlm import align
from manyheads.spec import parse
from manyheads.training.answers import answer_logits, answer_loss, train_answers
from tolerance import MODEL, SAME, assert_close, is_far, nearly, within

STRATEGIES = ["", "concentric_attention", "concentric_attention:positions=reverse,mask=reverse", "tc_llava:gamma=2"]


def vlm(trained=False):
    """A small model with its tower frozen, as that of a joined one is."""
    torch.manual_seed(0)
    made = joined_vlm.small(patches=4, size=2, dim=32, layers=2, heads=2)
    made.model.model.vision_tower.requires_grad_(trained)
    return made


def batch(model, rows=3, images=2, seed=0, longest=6):
    """Texts with two images each, some shorter than others."""
    generator = torch.Generator().manual_seed(seed)
    image = [model.language.image] * 16
    ids = torch.randint(3, 20, (rows, 2 * 16 + 2 + longest), generator=generator)
    ids[:, 0], ids[:, 1:17], ids[:, 18:34] = 1, torch.tensor(image), torch.tensor(image)
    mask = torch.ones_like(ids)
    mask[0, -2:], ids[0, -2:] = 0, 0
    at = torch.tensor([[34, 36]] * rows)
    return {
        "input_ids": ids, "attention_mask": mask, "at": at, "answers": ids.gather(1, at + 1),
        "pixel_values": torch.rand(rows * images, 3, 8, 8, generator=generator) * 2 - 1,
    }  # fmt: skip


@pytest.mark.parametrize("spec", STRATEGIES)
def test_a_pool_is_read_as_the_images_are(spec):
    model, strategies = vlm(), [parse(spec)] if spec else []
    first, second = batch(model), batch(model, seed=1, longest=9)
    pool = ImagePool.of(model, [first, second])
    assert len(pool) == 6 and pool.ids.shape[1] % 8 == 0
    rows = torch.tensor([5, 0, 4])
    with torch.no_grad():
        found = answer_logits(model.model, pool.batch(rows, strategies))
        with manyheads.use(model.model, *strategies) if strategies else nullcontext():
            wanted = torch.cat([answer_logits(model.model, x) for x in (first, second)])[rows]
        assert_close(found, wanted, within(torch.float32, MODEL))
        for wrong in (
            pool.batch(rows.flip(0), strategies),
            {**pool.batch(rows, strategies), "features": pool.batch(rows.flip(0))["features"]},
            pool.batch(rows, [parse("concentric_attention:positions=reverse" if spec == "" else
                                    "concentric_attention:positions=raster,mask=raster")]),
        ):  # fmt: skip
            assert is_far(answer_logits(model.model, wrong), wanted, within(torch.float32, MODEL))


def test_losses_and_gradients_are_those_without_a_pool():
    def gradients(fast, wrong=False):
        model = vlm()
        given = batch(model)
        read = ImagePool.of(model, [given]).batch(torch.arange(3)) if fast else given
        if wrong:
            read["places"] = read["places"].roll(1)
        loss = answer_loss(model.model, read)
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.model.parameters() if p.grad is not None])

    (loss, found), (plain, wanted) = gradients(True), gradients(False)
    assert_close(loss, plain, SAME)
    assert_close(found, wanted, within(torch.float32, 4 * MODEL))
    assert is_far(gradients(True, wrong=True)[1], wanted, within(torch.float32, 4 * MODEL))


def test_texts_may_share_images_and_a_trained_tower_is_refused():
    model = vlm()
    given = batch(model, rows=2)
    whole, parts = ImagePool.of(model, [given]), {**given, "pixel_values": given["pixel_values"][:1]}
    shared = ImagePool.of(model, [parts], torch.zeros(2, 2, dtype=torch.long))
    assert_close(shared.batch(torch.tensor([1]))["features"][1], whole.features[0], SAME)
    assert is_far(shared.batch(torch.tensor([1]))["features"][1], whole.features[1], SAME)
    with pytest.raises(manyheads.UserError, match="leave pool and align away"):
        image_features(vlm(trained=True), given["pixel_values"])
    with pytest.raises(manyheads.UserError, match="places images"):
        whole.batch(torch.tensor([0]), [parse("vcd")])
    with pytest.raises(manyheads.UserError, match="equally many images"):
        ImagePool.of(model, [{**given, "pixel_values": given["pixel_values"][:3]}], torch.zeros(2, 1).long())


def test_all_texts_come_before_any_comes_again():
    rows = orders(5, 4, 3, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert rows.shape == (4, 3)
    flat = rows.flatten().tolist()
    assert sorted(flat[:5]) == sorted(flat[5:10]) == list(range(5)) and flat[:5] != flat[5:10]


def test_a_projector_is_fitted_to_what_it_reads_and_writes():
    model = vlm()
    scales = torch.logspace(-2, 2, 16)
    features = torch.randn(4, 64, 16, generator=torch.Generator().manual_seed(0)) * scales + scales
    connects = model.model.model.multi_modal_projector.requires_grad_(False)
    words = model.model.get_input_embeddings().weight.std()
    assert is_far(connects(features).std(), words, 0.02)
    drawn = connects.linear_1.weight.detach().clone()
    fit_projector(model, features)
    flat = features.flatten(0, 1)
    wanted = (
        ((flat - flat.mean(0)) / flat.std(0)) @ drawn.T
        + connects.linear_1.bias
        + connects.linear_1.weight @ flat.mean(0)
    )
    assert_close(connects.linear_1(flat), wanted, within(torch.float32, 4 * MODEL))
    assert float(connects(features).std()) == nearly(float(words), torch.float32, 64)


def test_patches_learn_the_words_of_what_they_show():
    model = vlm()
    kinds = torch.randn(9, 16, generator=torch.Generator().manual_seed(1))
    cells = torch.tensor([[0, 3, -1, -1, -1, -1, -1, -1], [-1, -1, 1, -1, -1, -1, -1, 2]])
    shown = torch.tensor([[0, 8, 8, 1], [8, 2, 7, 8]]).view(2, 2, 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    features = kinds[shown.flatten(1)]
    assert align(model, features, cells, grid=2, cell=2, steps=60, lr=1e-2) < 0.2
    words = model.model.get_input_embeddings().weight
    apple = words[model.language.encode("apple")[0]]
    made = model.model.model.multi_modal_projector(features)
    near = (made - apple).square().mean(-1)
    assert (near.argsort(1)[0, :4].sort().values == torch.tensor([0, 1, 4, 5])).all()  # the patches of cell 0
    assert align(vlm(), features, cells.flip(0), grid=2, cell=2, steps=60, lr=1e-2) > 0.3  # control: others' cells


def test_a_pool_trains_what_texts_train():
    model = vlm()
    given = batch(model)
    pool = ImagePool.of(model, [given])
    state = train_answers(model.model, lambda _: pool.batch(torch.arange(3)), 12, lr=1e-2, slower=0.5)
    other = vlm()
    plain = train_answers(other.model, lambda _: given, 12, lr=1e-2, slower=0.5)
    assert state.losses == nearly(plain.losses, torch.float32, 1 << 14) and state.losses[-1] < state.losses[0] - 0.1
