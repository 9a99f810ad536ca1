# SPDX-License-Identifier: Apache-2.0
"""Pictures by class: a folder of one's own, sizes, draws, scores beside scikit-learn's, reference models by formula."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, log_loss
from torch import nn
from torch.nn.functional import conv2d

from manyheads.data import photograph_classes
from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks._field_training import FieldModel, Reference
from manyheads.tasks.vision._picture_models import InvertedBlock, PatchModel, ResidualBlock, StagedCNN
from manyheads.tasks.vision.picture_labels import Label, PictureLabels
from tolerance import DEEP, SAME, is_close, is_far

CLASSES = ("cat", "dog")


def folder_of(path, each=7, size=(12, 10)):
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (path / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(path / name / f"p{i}.png")
        (path / name / "notes.txt").write_text("no picture")
    (path / "empty").mkdir()
    return str(path)


@pytest.fixture
def task(tmp_path):
    return PictureLabels(folder=folder_of(tmp_path / "own"), dim=8, batch=4, steps=2, rates=(3e-3,), pixels=16)


def test_a_folder_is_parted_class_by_class(task):
    parts = {part: task.samples(part) for part in ("train", "validation", "test")}
    assert task.classes == CLASSES and {part: len(some) for part, some in parts.items()} == {
        "train": 10, "validation": 2, "test": 2,
    }  # fmt: skip
    names = [sample.name for some in parts.values() for sample in some]
    assert len(set(names)) == 14 and all(s.name.startswith(f"{s.target}/") for s in parts["train"])
    assert {s.target for s in parts["test"]} == set(CLASSES) and names != sorted(names)


@pytest.mark.slow
def test_photographs_are_parted_by_their_own_split():
    if not photograph_classes.available():
        pytest.skip("the data of this task are not on this machine")
    task = PictureLabels()
    sizes = {part: len(task.samples(part)) for part in ("train", "validation", "test")}
    assert sizes == {"train": 18_000, "validation": 2_000, "test": 5_000}
    assert all(sample.name.startswith("test ") == (sample.part == "test") for sample in task.samples("test"))
    images, labels = photograph_classes.photographs("test")
    first = task.samples("test")[0]
    at = int(first.name.split()[1])
    assert torch.equal(first.inputs, images[at]) and first.target == task.classes[int(labels[at])]


def test_what_is_no_such_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="0 folders of pictures"):
        PictureLabels(folder=str(tmp_path / "none")).samples("train")
    few = PictureLabels(folder=folder_of(tmp_path / "few", each=2))
    with pytest.raises(UserError, match="has 2 pictures"):
        few.samples("train")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read as a picture"):
        PictureLabels.open(tmp_path / "text.png")
    with pytest.raises(UserError, match="patch counts pixels"):
        PictureLabels(patch=0)
    with pytest.raises(UserError, match="batch is 2"):
        PictureLabels(batch=1)


def test_pictures_are_brought_to_one_size_or_left(task):
    wide = Sample("wide", "", "test", torch.full((3, 20, 40), 255, dtype=torch.uint8))
    small = Sample("small", "", "test", torch.zeros((3, 16, 16), dtype=torch.uint8))
    batch = task.collate([wide, small])["inputs"]
    assert batch.shape == (2, 3, 16, 16) and is_close(batch[0], 1.0) and (batch[1] == -1).all()
    left = PictureLabels(folder=task.folder, pixels=0)
    assert left.collate([wide])["inputs"].shape == (1, 3, 20, 40)
    with pytest.raises(UserError, match="small has another size than wide"):
        left.collate([wide, small])


def test_draws_are_mirrored_and_moved_by_up_to_an_eighth(task):
    """Each is the picture, mirrored or not, moved by whole pixels; without augmentation the picture itself."""
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    place = torch.stack((rows, columns, rows)).to(torch.uint8)
    sample = Sample("place", "", "train", place, "cat")
    seen = set()
    rng = np.random.default_rng(1)
    for _ in range(200):
        for one in task.draw(rng, [sample]):
            down, right = one.inputs[0, :, 8].long(), one.inputs[1, 8].long()
            mirrored = bool(right[4] > right[10])
            if mirrored:
                right = right.flip(0)
            dy, dx = int(down[8]) - 8, int(right[8]) - 8
            assert torch.equal(down, (torch.arange(16) + dy).clamp(0, 15))
            assert torch.equal(right, (torch.arange(16) + dx).clamp(0, 15))
            seen.add((mirrored, dy, dx))
    assert {dy for _, dy, _ in seen} == {dx for _, _, dx in seen} == set(range(-2, 3)) and len(seen) == 50
    plain = PictureLabels(folder=task.folder, augment=False)
    assert all(one is sample for one in plain.draw(rng, [sample]))


def test_scores_are_those_of_scikit_learn(task):
    rng = np.random.default_rng(2)
    right = rng.integers(0, 2, 40)
    said = torch.from_numpy(rng.normal(size=(40, 2))).log_softmax(-1)
    found = [
        task.score(Sample(str(i), "", "test", None, CLASSES[k]), Label(said[i], CLASSES)) for i, k in enumerate(right)
    ]
    means = {name: np.mean([one[name] for one in found]) for name in ("accuracy", "nll")}
    assert means["accuracy"] == pytest.approx(accuracy_score(right, said.argmax(1)))
    assert means["nll"] == pytest.approx(log_loss(right, said.exp()))
    assert means["nll"] != pytest.approx(log_loss(1 - right, said.exp()))
    floors = {metric.name: metric.floor for metric in task.stated}
    assert floors["accuracy"] == 0.5 and floors["nll"] is None


def test_what_is_said_of_files_of_any_size(task, tmp_path):
    model = task.reference(16).eval()
    trained = FieldModel(task, Reference(), model, 16)
    paths = [tmp_path / "a.png", tmp_path / "b.jpg"]
    for path, size in zip(paths, ((30, 9), (16, 16)), strict=True):
        Image.new("L", size, 90).save(path)
    said = trained.predict(paths)
    with torch.no_grad():
        want = model(task.collate([task.open(path) for path in paths])["inputs"]).log_softmax(-1)
    assert is_close(torch.stack([one.log_probs for one in said]), want, SAME)
    best = int(want[0].argmax())
    assert str(said[0]).startswith(f"{CLASSES[best]} {float(want[0, best].exp()):.3f}, {CLASSES[1 - best]} ")


def test_the_picture_of_confusion_has_shares_of_each_class(task):
    samples = [Sample(str(i), "", "test", None, name) for i, name in enumerate(("cat", "cat", "cat", "dog"))]
    said = [task.truth(Sample("", "", "test", None, name)) for name in ("cat", "dog", "dog", "dog")]
    (picture,) = task.pictures(samples, said)
    assert is_close(picture.values, [[1 / 3, 2 / 3], [0, 1]], SAME) and picture.axes == ("true", "said")


def drawn(module):
    with torch.no_grad():
        for name, x in module.state_dict().items():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if "var" in name else 0.4 * torch.randn_like(x))
    return module.double().eval()


def normed(x, norm):
    shape = (1, -1, 1, 1)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(shape)
    return (x - norm.running_mean.view(shape)) * scale + norm.bias.view(shape)


def test_reference_blocks_are_those_of_their_papers():
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    block = drawn(ResidualBlock(4, 6))
    first, norm, _, second, last = block.inner
    inner = normed(conv2d(normed(conv2d(x, first.weight, padding=1), norm).relu(), second.weight, padding=1), last)
    assert is_close(block(x), (x + inner).relu(), DEEP) and is_far(block(x), x + inner.relu(), DEEP)
    block = drawn(InvertedBlock(4, 9))
    wide, a, _, deep, b, _, narrow, c = block.inner
    h = normed(conv2d(x, wide.weight), a).clamp(0, 6)
    h = normed(conv2d(h, deep.weight, padding=1, groups=9), b).clamp(0, 6)
    inner = normed(conv2d(h, narrow.weight), c)
    assert is_close(block(x), x + inner, DEEP) and is_far(block(x), (x + inner).relu(), DEEP)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_reference_models_halve_sides_between_stages(patch):
    model = StagedCNN(ResidualBlock, patch, 8, 10, 2, 0.0, 3)
    sizes = []
    for part in model.trunk:
        part.register_forward_hook(lambda m, i, out: sizes.append(tuple(out.shape[1:])))
    assert model(torch.randn(2, 3, 32, 24)).shape == (2, 3)
    stages = [(8 * 2**i, -(-32 // patch // 2**i), -(-24 // patch // 2**i)) for i in range(4)]
    assert [size for size in dict.fromkeys(sizes) if len(size) == 3][:4] == stages
    assert sum(isinstance(part, ResidualBlock) for part in model.trunk) == 8


def test_blocks_over_patches_know_where_they_are(task):
    class Squared(nn.Module):
        def forward(self, x, mask):
            assert mask.all() and mask.shape == x.shape[:2]
            return x * x

    model = task.around([Squared()]).double()
    assert isinstance(model, PatchModel)
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    got = model(x)
    assert got.shape == (2, 2) and is_far(model(x.roll(4, 3)), got, DEEP) and is_far(model(x.roll(4, 2)), got, DEEP)
    model.blocks = nn.ModuleList()  # control: of a mean alone the order is lost
    model.norm = nn.Identity()
    assert is_close(model(x.roll(4, 3)), model(x), DEEP)
