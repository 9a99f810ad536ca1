# SPDX-License-Identifier: Apache-2.0
"""Focus-DETR: scores and layers in float64 by their formulas, what is kept, what stays as it is, labels, losses."""

import copy
import dataclasses

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, gelu, interpolate

from manyheads.attention.deformable import dense_weights, received
from manyheads.domains.vision.focus_detr import CASCADE, Scorer, counts, foreground, pixels
from manyheads.spec import parse
from manyheads.tasks.vision._boxes import focal
from manyheads.tasks.vision.object_detection import ObjectDetection
from tolerance import CLOSE, DEEP, FORMULA, is_close, is_far

EVERYTHING = "focus_detr:share=1,cascade=false,objects=0,values=tokens"


@pytest.fixture
def task():
    return ObjectDetection(dataset="planted", dim=16, layers=3, heads=2, batch=3, dropout=0.0)


@pytest.fixture
def batch(task):
    """The first image fills its canvas, the second one half of it."""
    made = dict(task.collate(task.samples("test")[:2]))
    made["extent"] = torch.tensor([[1.0, 1.0], [0.5, 1.0]])
    return made


def built(task, spec, moved=True):
    """In float64, and its weights away from what they begin as."""
    torch.manual_seed(3)
    model = parse(spec).build(task, 16).double().eval()
    with torch.no_grad():
        for x in model.parameters() if moved else ():
            x.add_(0.2 * torch.randn_like(x))
    return model


def maps_of(model, batch):
    return model.maps(batch["images"].double(), batch["extent"].double())


@pytest.mark.parametrize("by", ["foreground", "norm", "random"])
def test_an_encoder_that_keeps_everything_is_the_plain_one(task, batch, by):
    model = built(task, f"{EVERYTHING},by={by}")
    plain = built(task, EVERYTHING)
    plain.load_state_dict(model.state_dict(), strict=False)
    encoder = type(task.reference(16).encoder)(list(model.encoder.layers))
    maps = maps_of(model, batch)
    got, wanted = model.encoder(maps, model.embed), encoder(maps, model.embed)
    there = maps.there
    assert is_close(got.x[there], wanted.x[there], DEEP) and torch.equal(got.kept, wanted.kept)
    assert torch.equal(got.x[~there], maps.x[~there])  # beside an image nothing is refined
    for other in ("share=0.9", "cascade=true", "objects=5", "values=features"):  # controls: each of them matters
        name = other.partition("=")[0]
        fields = [f for f in EVERYTHING.partition(":")[2].split(",") if f.partition("=")[0] != name]
        changed = built(task, f"focus_detr:{','.join([*fields, other])},by={by}")
        changed.load_state_dict(model.state_dict(), strict=False)
        assert is_far(changed.encoder(maps, changed.embed).x[there], wanted.x[there], DEEP)


def by_hand(scorer, x):
    """Scores of the tokens of one map, one by one."""
    first, last = scorer.first, scorer.rest
    z = []
    for one in x:
        normed = (one - one.mean()) / (one.var(correction=0) + 1e-5).sqrt()
        z.append(gelu(first[1].weight @ (normed * first[0].weight + first[0].bias) + first[1].bias))
    half, mean = len(z[0]) // 2, sum(z) / len(z)
    found = []
    for one in z:
        h = torch.cat((one[:half], mean[half:]))
        for layer in (last[0], last[2]):
            h = gelu(layer.weight @ h + layer.bias)
        found.append(last[4].weight[0] @ h + last[4].bias[0])
    return torch.stack(found)


def test_a_token_is_scored_by_itself_and_by_the_mean_of_its_map():
    scorer = Scorer(8).double()
    x, there = torch.randn(2, 5, 8, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    there[1, 3:] = False
    got = scorer(x, there)
    assert is_close(got[0], by_hand(scorer, x[0]), 4 * FORMULA)
    assert is_close(got[1, :3], by_hand(scorer, x[1, :3]), 4 * FORMULA)
    assert is_far(got[1, :3], by_hand(scorer, x[1])[:3], 4 * FORMULA)  # control: what is beside the image counted


def test_scores_go_from_coarse_maps_to_fine_ones(task, batch):
    model = built(task, "focus_detr")
    encoder, maps = model.encoder, maps_of(model, batch)
    got, (made, _) = encoder.score(maps, model.embed), model.embed(maps.x + maps.positions)
    sizes = [h * w for h, w in maps.shapes]
    levels, there = made.split(sizes, 1), maps.there.split(sizes, 1)
    wanted = [encoder.scorer(levels[3], there[3])]
    for i in (2, 1, 0):
        up = interpolate(
            wanted[0].unflatten(1, maps.shapes[i + 1])[:, None], maps.shapes[i], mode="bilinear", align_corners=True
        ).flatten(1)
        wanted.insert(0, encoder.scorer(levels[i] + levels[i] * up[..., None] * encoder.alpha[i], there[i]))
    assert is_close(got, torch.cat(wanted, 1), DEEP)
    alone = torch.cat([encoder.scorer(x, t) for x, t in zip(levels, there, strict=True)], 1)
    assert is_far(got, alone, DEEP)
    apart = built(task, "focus_detr:top_down=false")
    assert is_close(apart.encoder.score(maps, model.embed), alone, DEEP)
    with torch.no_grad():
        encoder.alpha.zero_()
    assert is_close(encoder.score(maps, model.embed), alone, DEEP)
    fresh = [built(task, "focus_detr", moved=False).encoder.alpha for _ in range(3)]
    assert all(len(a) == 3 and (a.abs() <= 0.3).all() for a in fresh)


def test_so_many_are_kept_of_what_is_there():
    there = torch.arange(100)[None] < torch.tensor([[100], [50], [7], [1]])
    for share in (0.5, 0.3, 0.07, 1.0):
        wanted = [min(n, int(round(n * share, 6)) + 1) for n in (100, 50, 7, 1)]
        assert counts(there, share).tolist() == wanted
    assert counts(there, 0.07).tolist()[0] == 8  # 100 * 0.07 is a little more than 7 in floating point, and 7 here


def test_each_layer_refines_the_best_and_leaves_the_others_as_they_were(task, batch, monkeypatch):
    model = built(task, "focus_detr:share=0.4,objects=0")
    maps, seen = maps_of(model, batch), []
    for layer in model.encoder.layers:
        monkeypatch.setattr(layer, "forward", lambda x, *rest, own=layer.forward: seen.append(x) or own(x, *rest))
    got = model.encoder(maps, model.embed)
    scores = got.scores.masked_fill(~maps.there, -torch.inf)
    order = scores.argsort(dim=1, descending=True)
    for b in range(2):
        n = int(maps.there[b].sum())
        count = int(0.4 * n) + 1
        kept = [int(factor * count + 1e-6) for factor in CASCADE[:3]]
        best = order[b, : kept[0]]
        assert kept[0] > kept[1] > kept[2] and set(torch.nonzero(got.kept[b]).flatten().tolist()) == set(best.tolist())
        assert torch.equal(got.x[b][~got.kept[b]], maps.x[b][~got.kept[b]])
        assert (got.x[b][best] != maps.x[b][best]).any(-1).all()
        assert torch.equal(seen[0][b, : kept[0]], maps.x[b, best])  # in the order of their scores
        again = seen[2][b, : kept[2]]  # what the third layer gets, the second has made
        assert is_far(again, maps.x[b, best[: kept[2]]])
    assert [x.shape[1] for x in seen] == [int(f * counts(maps.there, 0.4)[0] + 1e-6) for f in CASCADE[:3]]
    flat = built(task, "focus_detr:share=0.4,objects=0,cascade=false")
    monkeypatch.setattr(flat.encoder.layers[2], "forward", lambda x, *rest: seen.append(x) or x)
    flat.encoder(maps, flat.embed)
    assert seen[-1].shape[1] == counts(maps.there, 0.4)[0]


def normed(x, layer):
    made = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return made * layer.weight + layer.bias


def among(x, positions, layer, norm, heads=2):
    """Attention of some tokens ``[T, D]`` to each other, head by head, added and normalised."""
    size, parts = x.shape[1] // heads, []
    wq, wk, wv = layer.in_proj_weight.chunk(3)
    bq, bk, bv = layer.in_proj_bias.chunk(3)
    q, k, v = (x + positions) @ wq.T + bq, (x + positions) @ wk.T + bk, x @ wv.T + bv
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        parts.append((q[:, own] @ k[:, own].T / size**0.5).softmax(-1) @ v[:, own])
    return normed(x + torch.cat(parts, -1) @ layer.out_proj.weight.T + layer.out_proj.bias, norm)


def test_a_layer_is_its_formula(task, batch):
    """Dual attention of the first layer: among objects in full, then deformable by its matrix, then feed-forward."""
    task = dataclasses.replace(task, layers=1)
    model = built(task, "focus_detr:share=0.3,objects=6")
    encoder, maps = model.encoder, maps_of(model, batch)
    layer, got = encoder.layers[0], encoder(maps, model.embed)
    for b in range(2):
        scores = got.scores[b].masked_fill(~maps.there[b], -torch.inf)
        at = scores.argsort(descending=True)[: int(counts(maps.there, 0.3)[b])]
        x, positions = maps.x[b, at], maps.positions[b, at]
        classes = model.classify[0](normed(x @ model.project[0].weight.T + model.project[0].bias, model.project[1]))
        sure = classes.sigmoid().max(-1).values * scores[at].sigmoid()
        some = sure.argsort(descending=True)[:6]
        x = x.clone()
        x[some] = among(x[some], positions[some], encoder.among[0], encoder.norms[0])
        a = layer.attention
        places, weights = a.looks((x + positions)[None], maps.points[b, at][None], maps.shapes)
        value = (maps.x[b] @ a.value.weight.T + a.value.bias) * maps.there[b][:, None]
        matrix = dense_weights(maps.shapes, places, weights)[0]
        read = torch.cat([matrix[h] @ value[:, 8 * h : 8 * h + 8] for h in range(2)], -1)
        x = normed(x + read @ a.out.weight.T + a.out.bias, layer.norms[0])
        fed = (x @ layer.feed[0].weight.T + layer.feed[0].bias).clamp(min=0) @ layer.feed[3].weight.T
        wanted = normed(x + fed + layer.feed[3].bias, layer.norms[1])
        assert is_close(got.x[b, at], wanted, DEEP)
    other = copy.deepcopy(model)
    other.encoder.focus = dataclasses.replace(model.encoder.focus, objects=5)
    assert is_far(other.encoder(maps, other.embed).x[1, at], wanted, DEEP)


def test_labels_of_tokens_near_a_box_of_known_size():
    """Cells of 8 pixels, of a map of 8 x 8 and one of 4 x 4: a box from 8 to 40, across and down."""
    shapes = [(8, 8), (4, 4)]
    y, x = torch.meshgrid(torch.arange(8) * 8 + 4.0, torch.arange(8) * 8 + 4.0, indexing="ij")
    fine = torch.stack((x, y), -1).flatten(0, 1)
    y, x = torch.meshgrid(torch.arange(4) * 16 + 8.0, torch.arange(4) * 16 + 8.0, indexing="ij")
    points = torch.cat((fine, torch.stack((x, y), -1).flatten(0, 1)))[None]
    box = torch.tensor([[[8.0, 8, 40, 40], [torch.nan] * 4]])

    def where(reach, overlap=1.0, boxes=box):
        found = foreground(points, shapes, boxes, stride=8, reach=reach, overlap=overlap)[0]
        first, second = found[:64].unflatten(0, (8, 8)), found[64:].unflatten(0, (4, 4))
        return [torch.nonzero(each).tolist() for each in (first, second)]

    square = [[i, j] for i in range(1, 5) for j in range(1, 5)]
    assert where(8) == [square, []]  # all within 64 pixels of its edges: the finest map has them
    near = [[i, j] for i in (2, 3) for j in (2, 3)]  # centres at 20 and 28: at most 20 pixels away
    assert where(2.5) == [near, []]  # the coarser map's one centre, (24, 24), is 16 away, and its range begins at 20
    assert where(1.5) == [[], [[1, 1]]] and where(2.0) == [[], []]  # at 12, and at 16
    assert where(2.5, 1.5) == [square, [[1, 1]]]  # up to 30, and from 13.3
    both = torch.tensor([[[8.0, 8, 40, 40], [16.0, 16, 24, 24]]])  # in the smaller one lies (20, 20), 4 away
    assert where(1.5, boxes=both) == [[[2, 2]], [[1, 1]]]
    assert where(8, boxes=torch.full((1, 2, 4), torch.nan)) == [[], []]


def test_boxes_that_fill_up_a_batch_are_none(task, batch):
    batch = {**batch, "labels": torch.tensor([[0, -1], [2, 1]]), "boxes": torch.full((2, 2, 4), 0.5)}
    edges = pixels(batch, 160, 120)
    assert edges[0, 0].tolist() == [40, 30, 120, 90] and edges[0, 1].isnan().all() and not edges[1].isnan().any()


def test_the_loss_of_tokens_is_over_positive_ones_of_an_image(task):
    logits, there = torch.randn(2, 6), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    wanted = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]]).bool()
    each = [focal(logits[i][there[i]], wanted[i][there[i]].float()).sum() for i in range(2)]
    assert is_close(task.token_loss(logits, wanted, there), (each[0] / 3 + each[1]) / 2, CLOSE)
    assert float(task.token_loss(torch.where(wanted, 40.0, -40.0), wanted, there)) < 1e-9


def test_the_loss_is_the_detectors_and_that_of_the_scores(task):
    batch = task.collate(task.samples("train")[:2])
    losses = {}
    for weight in (0.0, 1.5):
        recipe, model = parse(f"focus_detr:weight={weight}"), built(task, "focus_detr").float()
        losses[weight] = recipe.loss(task, model, batch)
    found = model(batch["images"], batch["extent"])
    plain, maps = task.criterion(found, batch), found.maps
    points = maps.points * torch.tensor([160.0, 120.0])
    labels = foreground(points, maps.shapes, pixels(batch, 160, 120), stride=8, reach=8.0, overlap=1.0)
    assert labels.any(1).all() and not labels[:, 300:].any()  # planted shapes have sides below 64 pixels
    wanted = plain + 1.5 * task.token_loss(found.encoded.scores, labels, maps.there)
    assert is_close(losses[1.5], wanted) and is_close(losses[0.0], plain) and is_far(wanted, plain)
    losses[1.5].backward()
    assert model.encoder.scorer.rest[4].weight.grad.any() and model.encoder.alpha.grad.any()


def test_scores_learn_what_the_decoder_attends_to(task):
    batch = task.collate(task.samples("train")[:2])
    recipe, model = parse("focus_detr:by=decoder,share=0.2,weight=2"), built(task, "focus_detr:by=decoder").float()
    seen = []
    for layer in model.layers:
        looks = layer.attention.looks
        layer.attention.looks = lambda q, r, s, looks=looks: seen.append((s, *looks(q, r, s))) or seen[-1][1:]
    got = recipe.loss(task, model, batch)
    attended = sum(received(*one) for one in seen)
    found = model(batch["images"], batch["extent"])
    maps = found.maps
    assert len(seen) == 6 and attended.shape == maps.there.shape
    wanted = torch.zeros_like(maps.there)
    for b, many in enumerate(counts(maps.there, 0.2).tolist()):
        wanted[b, attended[b].argsort(descending=True)[:many]] = True
    extra = binary_cross_entropy_with_logits(found.encoded.scores, wanted.float())
    plain = task.criterion(found, batch)
    assert is_close(got, plain + 2 * extra) and is_far(got, plain)
    assert not any(layer.attention.show for layer in built(task, "focus_detr").layers)


def test_controls_keep_as_many_by_norm_or_by_chance(task, batch):
    model = built(task, "focus_detr:by=norm")
    maps = maps_of(model, batch)
    norms = maps.x.pow(2).sum(-1).sqrt().masked_fill(~maps.there, 0.0)
    kept = model.encoder(maps, model.embed).kept
    assert torch.equal(kept.sum(1), counts(maps.there, 0.5))
    assert all(norms[b][kept[b]].min() >= norms[b][~kept[b]].max() for b in range(2))
    drawn = built(task, "focus_detr:by=random")
    first, again = (drawn.encoder(maps, drawn.embed).kept for _ in range(2))
    assert torch.equal(first, again) and torch.equal(first.sum(1), counts(maps.there, 0.5))
    assert not hasattr(drawn.encoder, "scorer")
    drawn.train()
    assert not torch.equal(drawn.encoder(maps, drawn.embed).kept, drawn.encoder(maps, drawn.embed).kept)


def test_foreground_is_found_after_some_steps():
    """With a twentieth of a training it holds more of it than chance does."""
    task = ObjectDetection(dataset="planted", dim=16, layers=1, heads=2, batch=4, dropout=0.0)
    recipe = parse("focus_detr:share=0.2,objects=20")
    torch.manual_seed(0)
    model = recipe.build(task, 32)
    optimizer, samples = torch.optim.AdamW(model.parameters(), 5e-3), task.samples("train")
    batches = [task.collate(samples[i : i + 4]) for i in range(0, 100, 4)]

    def recall():
        judged = task.judged("validation")[:24]
        said = task.said(recipe, model.eval(), judged, torch.device("cpu"))
        found = task.scores(judged, said)
        return sum(one["foreground_recall"] for one in found) / len(found)

    before = recall()
    for batch in batches:
        loss = recipe.loss(task, model.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before < 0.4 < 0.55 < recall()


def test_pictures_show_scores_of_the_finest_map(task):
    batch = task.collate(task.samples("test")[:2])
    recipe, model = parse("focus_detr"), built(task, "focus_detr").float()
    with torch.no_grad():
        (shown,) = recipe.pictures(model, batch)
        found = model(batch["images"], batch["extent"])
    assert len(shown.rows) == 15 and len(shown.columns) == 20 and shown.rows[1] == "8"
    assert is_close(torch.tensor(shown.values).flatten(), found.encoded.scores[0, :300].sigmoid())
    assert parse("focus_detr:by=norm").pictures(model, batch) == ()
