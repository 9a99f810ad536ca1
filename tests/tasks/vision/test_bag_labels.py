# SPDX-License-Identifier: Apache-2.0
"""Bags: models against formulas in float64, folds, scores beside scikit-learn's, a folder and files of one's own."""

import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks.vision._bag_task import Diagnosis
from manyheads.tasks.vision._bags import (
    AttentionPool,
    BagModel,
    BagTransformer,
    BlockPool,
    DualStream,
    MaxPool,
    MeanPool,
)  # fmt: skip
from manyheads.tasks.vision.bag_labels import BagLabels
from tolerance import DEEP, is_close, is_far

F, W, A = 5, 8, 6
POOLS = {
    "abmil": lambda: AttentionPool(W, A), "gated": lambda: AttentionPool(W, A, gated=True), "mean": lambda: MeanPool(W),
    "max": lambda: MaxPool(W), "dsmil": lambda: DualStream(W, A),
    "transformer": lambda: BagTransformer(W, A, 2, 2, 0.0),
    "blocks": lambda: BlockPool([Doubled(), Doubled()], W, A),
}  # fmt: skip


class Doubled(torch.nn.Module):
    """A block without parameters."""

    def forward(self, x, mask):
        return x + x.tanh()


def made(name):
    model = BagModel(POOLS[name](), torch.randn(F), torch.rand(F) + 0.5, W, 0.0).double().eval()
    with torch.no_grad():
        for x in model.parameters():
            x.copy_(0.6 * torch.randn_like(x))
    return model


def attention(layer, x, heads=2):
    """Outputs and weights ``[H, N, N]`` of a layer of torch, head by head."""
    q, k, v = (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, -1)
    size, out, weights = A // heads, [], []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights.append((q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1))
        out.append(weights[-1] @ v[:, part])
    return torch.cat(out, -1) @ layer.out_proj.weight.T + layer.out_proj.bias, torch.stack(weights)


def reference(model, name, x):
    """Logits, state and scores ``[H, N]`` of one bag ``[N, F]``, instance by instance."""
    first, pool = model.features[0], model.pool
    h = torch.stack([(first.weight @ ((one - model.mean) / model.deviation) + first.bias).clamp(min=0) for one in x])
    if name in ("abmil", "gated"):
        s = []
        for one in h:
            seen = (pool.v.weight @ one).tanh()
            s.append(pool.w.weight[0] @ (seen * (pool.u.weight @ one).sigmoid() if name == "gated" else seen))
        a = torch.stack(s).exp()
        a = a / a.sum()
        state = sum(w * one for w, one in zip(a, h, strict=True))
        return pool.head(state), state, a[None]
    if name == "mean":
        return pool.head(h.mean(0)), h.mean(0), torch.full((1, len(h)), 1 / len(h), dtype=h.dtype)
    if name == "max":
        odds = torch.stack([pool.head(one)[1] - pool.head(one)[0] for one in h])
        best = int(odds.argmax())
        return pool.head(h[best]), h[best], odds[None]
    if name == "dsmil":
        each = torch.stack([pool.instance(one) for one in h])
        q, states = torch.stack([pool.query(one) for one in h]), []
        for c in range(2):
            critical = q[int(each[:, c].argmax())]
            a = (q @ critical / math.sqrt(A)).softmax(0)
            states.append(sum(w * one for w, one in zip(a, h, strict=True)))
        state = torch.cat(states)
        return (each.max(0).values + pool.head(state)) / 2, state, each.max(1).values[None]
    z = torch.stack([pool.enter(one) for one in h])
    if name == "blocks":
        for _ in range(2):
            z = z + z.tanh()
        return pool.pool.head(z.mean(0)), z.mean(0), torch.full((1, len(h)), 1 / len(h), dtype=h.dtype)
    z, scores = torch.cat((pool.token[None], z)), None
    for layer, norm in zip(pool.layers, pool.norms[:2], strict=True):
        added, weights = attention(layer, norm(z))
        scores = weights[:, 0, 1:] if scores is None else scores
        z = z + added
    state = pool.norms[2](z[0])
    return pool.head(state), state, scores


@pytest.mark.parametrize("name", POOLS)
def test_a_model_is_its_formula_forward_and_backward_and_padding_changes_nothing(name):
    model, bags = made(name), [torch.randn(n, F, dtype=torch.float64) for n in (4, 7, 1)]
    inputs, mask = 9 * torch.randn(3, 7, F, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.bool)
    for i, bag in enumerate(bags):  # what fills up is far from 0
        inputs[i, : len(bag)], mask[i, : len(bag)] = bag, True
    weights, grads = torch.randn(3, 2, dtype=torch.float64), []
    read = model.read(inputs, mask)
    wanted = [reference(model, name, bag) for bag in bags]
    for logits in (read.logits, torch.stack([one[0] for one in wanted])):
        model.zero_grad()
        (logits * weights).sum().backward()
        grads.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1]) > 4
    size = float(weights.square().mean().sqrt())  # of what goes back; gradients of scores cancel, as weights sum to 1
    for i, (got, want) in enumerate(zip(*grads, strict=True)):
        assert is_close(got, want, DEEP, unit=size if i else None)
    for i, (bag, (_, state, scores)) in enumerate(zip(bags, wanted, strict=True)):
        assert is_close(read.state[i], state, DEEP) and is_close(read.scores[i, :, : len(bag)], scores, DEEP)
        assert (read.scores[i, :, len(bag) :] == -math.inf).all()
    assert is_far(model(inputs, torch.ones_like(mask)), grads[1][0], DEEP)  # control: the rest were read too


@pytest.mark.parametrize("name", POOLS)
def test_the_order_of_instances_says_nothing(name):
    model, order = made(name), torch.tensor([3, 1, 4, 0, 2])
    x, mask = torch.randn(2, 5, F, dtype=torch.float64), torch.ones(2, 5, dtype=torch.bool)
    before, after = model.read(x, mask), model.read(x[:, order], mask)
    assert is_close(after.logits, before.logits, DEEP) and is_close(after.scores, before.scores[..., order], DEEP)
    other = x.clone()
    other[:, 0] = x[:, 1] + 1
    assert name == "max" or is_far(model(other, mask), before.logits, DEEP)  # control: what they hold does


def folder_of(path, patients=8, bags=2, labels=("0", "1")):
    rng, rows = np.random.default_rng(0), ["bag,patient,label"]
    for i in range(patients):
        for n in range(bags):
            rows.append(f"b{i}{n},p{i},{labels[i % 2]}")
            save_file({"features": rng.normal(i % 2, 1, (3 + n, 4))}, path / f"b{i}{n}.safetensors")
    (path / "bags.csv").write_text("\n".join(rows))
    return path


def test_folds_test_every_bag_once_and_part_patients(tmp_path):
    task = BagLabels(folder=str(folder_of(tmp_path)))
    assert task.classes == ("0", "1") and task.label == ""
    tested = []
    for fold in range(4):  # four patients of each label
        parts = [BagLabels(folder=str(tmp_path), fold=fold).samples(part) for part in ("train", "validation", "test")]
        groups = [{s.group for s in some} for some in parts]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 8
        assert all({s.target for s in some} == {"0", "1"} for some in parts)
        assert [{s.part for s in some} for some in parts] == [{"train"}, {"validation"}, {"test"}]
        tested += [s.name for s in parts[2]]
    assert len(tested) == len(set(tested)) == 16
    again = BagLabels(folder=str(tmp_path), fold=4)  # as the first
    assert [s.name for s in again.samples("test")] == [s.name for s in task.samples("test")]


def test_bags_of_digits_in_parts():
    task = BagLabels(dataset="digits", fold=3)
    assert [len(task.samples(part)) for part in ("train", "validation", "test")] == [160, 36, 36]
    assert {s.about["fold"] for s in task.samples("test")} == {3} and task.label == "digits"
    assert {s.about["fold"] for s in task.samples("validation")} == {4}
    assert not any(s.about["extra"] for s in task.samples("train"))


def test_features_are_scaled_by_the_training_part_alone(tmp_path):
    task = BagLabels(folder=str(folder_of(tmp_path)))
    model = task.reference(8)
    train = torch.cat([s.inputs for s in task.samples("train")])
    everything = torch.cat([s.inputs for part in ("train", "validation", "test") for s in task.samples(part)])
    assert is_close(model.mean, train.mean(0)) and is_close(model.deviation, train.std(0, correction=0))
    assert is_far(model.mean, everything.mean(0))


def said_of(odds, names=("0", "1")):
    return Diagnosis(torch.tensor([0.0, odds]).log_softmax(-1), names)


def test_scores_have_the_means_of_scikit_learn(tmp_path):
    task = BagLabels(folder=str(folder_of(tmp_path)))
    rng = np.random.default_rng(3)
    right, odds = rng.permutation([0, 1] * 10 + [1] * 5), rng.normal(size=25)
    about = {"kind": "", "extra": False}
    samples = [Sample(str(i), str(i), "test", None, str(r), about) for i, r in enumerate(right)]
    found = task.scores(samples, [said_of(one) for one in odds])
    means = {name: np.mean([one[name] for one in found]) for name in ("auc", "accuracy", "f1")}
    assert abs(means["auc"] - roc_auc_score(right, odds)) < 1e-6
    assert abs(means["accuracy"] - accuracy_score(right, odds > 0)) < 1e-6
    assert abs(means["f1"] - f1_score(right, odds > 0)) < 1e-6 < abs(means["f1"] - f1_score(1 - right, odds <= 0))
    assert all("hard_auc" not in one for one in found)


def test_hard_bags_have_an_area_of_their_own():
    task, rng = BagLabels(dataset="digits"), np.random.default_rng(1)
    samples = task.samples("test")
    odds = rng.normal(size=len(samples))
    found = task.scores(samples, [said_of(one, task.classes) for one in odds])
    kinds, extra = (np.array([s.about[key] for s in samples]) for key in ("kind", "extra"))
    hard = kinds != "easy"
    for name, which in (("hard_auc", hard), ("auc", ~extra)):
        values = [one[name] for one in found if name in one]
        assert len(values) == which.sum()
        assert abs(np.mean(values) - roc_auc_score(kinds[which] != "none", odds[which])) < 1e-6
    assert sum("accuracy" in one for one in found) == (~extra).sum() == 20 and hard.sum() == 27


def test_one_label_alone_has_no_area(tmp_path):
    task = BagLabels(folder=str(folder_of(tmp_path)))
    samples = [Sample(str(i), str(i), "test", None, "1", {"kind": "", "extra": False}) for i in range(3)]
    (first, *_) = task.scores(samples, [said_of(one) for one in (1.0, -1.0, 2.0)])
    assert set(first) == {"accuracy", "f1"}


def test_what_is_said_names_instances(tmp_path):
    task = BagLabels(folder=str(folder_of(tmp_path)), dropout=0.0)
    model = task.reference(8).eval()
    save_file({"x": np.random.default_rng(5).normal(size=(6, 4))}, tmp_path / "mine.safetensors")
    sample = task.open(tmp_path / "mine.safetensors")
    with torch.no_grad():
        (said,) = task.predict(model, task.collate([sample]))
        read = model.read(sample.inputs[None], torch.ones(1, 6, dtype=torch.bool))
    assert is_close(said.scores, read.scores[0, 0]) and is_close(said.log_probs, read.logits[0].log_softmax(-1))
    first = read.scores[0, 0].argsort(descending=True)[:3].tolist()
    assert str(said).endswith(f"by instances {', '.join(map(str, first))} first")
    assert f"probability {float(said.log_probs.max().exp()):.3f}" in str(said)
    save_file({"x": np.ones((2, 5))}, tmp_path / "wide.safetensors")
    with pytest.raises(UserError, match="other features"):
        task.collate([task.open(tmp_path / "wide.safetensors")])


def test_what_cannot_be_parted_is_refused(tmp_path):
    for name, labels, patients, match in (
        ("few", ("0", "1"), 5, "three of each"), ("one", ("0", "0"), 6, "should be two"),
    ):  # fmt: skip
        (tmp_path / name).mkdir()
        task = BagLabels(folder=str(folder_of(tmp_path / name, patients, labels=labels)))
        with pytest.raises(UserError, match=match):
            task.samples("train")
