# SPDX-License-Identifier: Apache-2.0
"""MHIM-MIL: what is hidden, beside sets of Python; the teacher, its consistency, what is left at ratios of 0."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from manyheads.domains.vision.mhim import Mhim, Taught, consistency, kept, packed
from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.spec import parse
from manyheads.tasks._field_training import FieldTraining
from manyheads.tasks.vision.bag_labels import BagLabels
from tolerance import FORMULA, SAME, is_close, is_far

FREE = "mhim:high=0,random=0,weight=0,before=0,initial=all"


@pytest.fixture
def task():
    return BagLabels(dataset="digits", dim=8, batch=6, steps=5, rates=(3e-3,), dropout=0.0, heads=2)


def batch_of(task, seed=0):
    return task.collate(task.draw(np.random.default_rng(seed), task.samples("train")))


def learner(task, spec, width=12):
    recipe = parse(spec)
    return recipe, recipe.learner(task, recipe.build(task, width), width).train()


def ragged(heads=1):
    lengths = torch.tensor([20, 7, 1, 2, 13])
    mask = torch.arange(20) < lengths[:, None]
    return torch.rand(5, heads, 20), mask


def sets(scores, mask, high, low):
    """Hidden instances of each bag: sets of Python, as votes of heads."""
    found = []
    for each, there in zip(scores.tolist(), mask.tolist(), strict=True):
        n, hidden = sum(there), set()
        for sign, ratio in ((1, high), (-1, low)):
            k = math.ceil(round(n * ratio, 9))
            votes = dict.fromkeys(range(n), 0)
            for head in each:
                for i in sorted(range(n), key=lambda i: -sign * head[i])[:k]:
                    votes[i] += 1
            mean = {i: sign * sum(head[i] for head in each) / len(each) for i in range(n)}
            hidden |= set(sorted(range(n), key=lambda i: (-votes[i], -mean[i]))[:k])
        found.append(hidden if len(hidden) < n else set())
    return found


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("high", "low"), [(0.05, 0.0), (0.3, 0.0), (0.0, 0.4), (0.25, 0.35), (0.6, 0.6), (0.0, 0.0)])
def test_what_is_hidden_is_exactly_the_most_and_the_least_attended(high, low, heads):
    scores, mask = ragged(heads)
    rest = kept(scores.masked_fill(~mask[:, None], -math.inf), mask, high=high, low=low)
    hidden = [set(torch.nonzero(mask[b] & ~rest[b]).flatten().tolist()) for b in range(5)]
    assert hidden == sets(scores, mask, high, low) and not (rest & ~mask).any() and rest.any(1).all()
    if high != low:  # control: by scores turned round it is others
        assert hidden != sets(-scores, mask, high, low)


def test_a_product_that_is_whole_is_not_rounded_up():
    mask = torch.ones(1, 100, dtype=torch.bool)
    scores = torch.rand(1, 1, 100)
    for ratio in (0.07, 0.29, 0.57):  # 100 * 0.07 is 7.000000000000001
        assert int((~kept(scores, mask, high=ratio)).sum()) == round(100 * ratio)
        assert int((~kept(scores, mask, high=torch.tensor(ratio))).sum()) == round(100 * ratio)
    assert int((~kept(scores, mask, high=0.071)).sum()) == 8


def test_random_ones_are_as_many_and_others_each_time():
    _, mask = ragged()
    rests = torch.stack([kept(None, mask, high=0.0, random=0.5) for _ in range(60)])
    hidden = (mask & ~rests).sum(2)
    assert (hidden == torch.tensor([10, 4, 0, 1, 7])).all()  # of the bag of one, nothing
    assert len({tuple(rest[0].tolist()) for rest in rests}) > 50
    shares = (~rests[:, 0]).float().mean(0)  # each instance is hidden as often as another
    assert (shares - 0.5).abs().max() < 4 * 0.5 / 60**0.5


def test_a_share_of_the_most_attended_is_hidden_at_random():
    """h N instances, all of them among the h N / share highest, each as often."""
    scores, mask = torch.rand(1, 1, 40), torch.ones(1, 40, dtype=torch.bool)
    rests = torch.cat([kept(scores, mask, high=0.1, share=0.5) for _ in range(200)])
    assert ((~rests).sum(1) == 4).all()
    wide = set(scores[0, 0].argsort(descending=True)[:8].tolist())
    shares = (~rests).float().mean(0)
    assert set(torch.nonzero(shares).flatten().tolist()) == wide
    assert (shares[sorted(wide)] - 0.5).abs().max() < 4 * 0.5 / 200**0.5
    whole = torch.cat([kept(scores, mask, high=0.1) for _ in range(3)])  # control: with share 1 always the same
    assert (whole == whole[0]).all()


def test_what_is_hidden_is_a_union():
    scores, mask = (x[[0, 1, 4]] for x in ragged())  # of the smaller ones nothing would be left
    torch.manual_seed(0)
    alone = kept(None, mask, high=0.0, random=0.3)
    torch.manual_seed(0)
    both = kept(scores, mask, high=0.2, low=0.2, random=0.3)
    by_scores = kept(scores, mask, high=0.2, low=0.2)
    want = alone & by_scores
    assert torch.equal(both, torch.where(want.any(1, keepdim=True), want, mask)) and (both != by_scores).any()


def test_packed_instances_are_those_that_are_left_in_their_order():
    inputs, rest = torch.randn(3, 6, 2), torch.rand(3, 6) < 0.5
    rest[:, 0] = True
    short, mask = packed(inputs, rest)
    assert short.shape[1] == int(rest.sum(1).max())
    for b in range(3):
        assert torch.equal(short[b][mask[b]], inputs[b][rest[b]]) and int(mask[b].sum()) == int(rest[b].sum())
    whole, _ = packed(inputs, torch.ones(3, 6, dtype=torch.bool))
    assert torch.equal(whole, inputs)


def spied(monkeypatch, model, seen):
    """``seen`` gets the bags that the student reads."""
    read = model.student.read

    def told(inputs, mask):
        seen.append([inputs[b][mask[b]] for b in range(len(inputs))])
        return read(inputs, mask)

    monkeypatch.setattr(model.student, "read", told)


@pytest.mark.parametrize("base", ["abmil", "gated_abmil", "dsmil", "bag_transformer"])
def test_the_student_reads_all_but_what_the_teacher_attends_to_most(task, monkeypatch, base):
    recipe, model = learner(task, f"mhim:base={base},high=0.1,share=1,random=0")
    batch, seen = batch_of(task), []
    spied(monkeypatch, model, seen)
    recipe.loss(task, model, batch)
    scores = model.teacher.read(batch["inputs"], batch["mask"]).scores
    hidden = sets(scores, batch["mask"], 0.1, 0.0)
    by_student = sets(-scores, batch["mask"], 0.1, 0.0)
    for b, bag in enumerate(batch["inputs"]):
        left = [i for i in range(60) if i not in hidden[b]]
        assert len(left) == 54 and torch.equal(seen[0][b], bag[left]) and hidden[b] != by_student[b]


def test_fewer_are_hidden_as_training_goes_on(task, monkeypatch):
    """h' = h (1 + cos(pi t)) / 2: 12 of 60 at first, half in the middle, none at the end."""
    for spec, wanted in (("", [12, 11, 6, 2, 0]), (",decay=false", [12] * 5)):
        recipe, model = learner(task, f"mhim:high=0.2,share=1,random=0{spec}")
        batch, seen = batch_of(task), []
        spied(monkeypatch, model, seen)
        for t in (0.0, 0.25, 0.5, 0.75, 1.0):
            recipe.after_step(model, t)
            recipe.loss(task, model, batch)
        assert [60 - len(bags[0]) for bags in seen] == wanted


def test_by_random_the_teacher_has_no_say(task, monkeypatch):
    recipe, model = learner(task, "mhim:high=0.1,share=1,random=0,by=random")
    batch, seen = batch_of(task), []
    spied(monkeypatch, model, seen)
    for _ in range(3):
        recipe.loss(task, model, batch)
    assert {len(bag) for bags in seen for bag in bags} == {54} and not torch.equal(seen[0][0], seen[1][0])
    own, told = learner(task, "mhim:high=0.1,share=1,random=0")  # control: the teacher's choice does not change
    spied(monkeypatch, told, again := [])
    for _ in range(2):
        own.loss(task, told, batch)
    assert torch.equal(again[0][0], again[1][0])


def test_the_loss_is_its_formula(task):
    """Whole bags are read by the teacher, the rest by the student; the temperature is the teacher's alone."""
    recipe, model = learner(task, "mhim:high=0.1,share=1,random=0,low=0.2,weight=0.7,temperature=0.3")
    batch = batch_of(task)
    _, taught, scores = model.teacher.read(batch["inputs"], batch["mask"])
    rest = kept(scores, batch["mask"], high=0.1, low=0.2)
    logits, states = [], []
    for bag, left in zip(batch["inputs"], rest, strict=True):
        read = model.student.read(bag[left][None], torch.ones(1, int(left.sum()), dtype=torch.bool))
        logits.append(read.logits[0])
        states.append(read.state[0])
    wanted = (taught / 0.3).softmax(-1)
    apart = (wanted * (wanted.log() - torch.stack(states).log_softmax(-1))).sum(-1).mean()
    plain = cross_entropy(torch.stack(logits), batch["targets"])
    got = recipe.loss(task, model, batch)
    assert is_close(got, plain + 0.7 * apart, SAME) and is_far(got, plain, SAME)
    alone = parse("mhim:high=0.1,share=1,random=0,low=0.2,weight=0").loss(task, model, batch)
    assert is_close(alone, plain, SAME)


def test_consistency_is_least_where_the_student_says_what_the_teacher_does():
    taught, t = torch.randn(4, 6, dtype=torch.float64), 0.1
    same = (taught / t + torch.randn(4, 1)).requires_grad_()
    least = consistency(taught, same, t)
    (gradient,) = torch.autograd.grad(least, same)
    assert abs(least.detach()) < 1e-12 and gradient.abs().max() < 1e-12
    assert float(consistency(taught, taught, t)) > 0.1  # control: the teacher's temperature is no other's
    said = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    hard = -((taught / t).softmax(-1) * said.log_softmax(-1)).sum(-1).mean()  # the paper's cross-entropy
    (own,), (paper) = torch.autograd.grad(consistency(taught, said, t), said), torch.autograd.grad(hard, said)[0]
    assert is_close(own, paper, 8 * FORMULA)


def test_the_teacher_gets_no_gradient_and_follows_the_student(task):
    recipe, model = learner(task, "mhim:high=0.1,momentum=0.9")
    recipe.loss(task, model, batch_of(task)).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())
    assert all(p.grad is not None and p.requires_grad for p in model.student.parameters())
    for p in model.student.parameters():
        p.data += 1.0
    first = [p.clone() for p in model.teacher.parameters()]
    for i in range(5):
        recipe.after_step(model, i / 10)
    for now, then, held in zip(model.teacher.parameters(), first, model.student.parameters(), strict=True):
        assert is_close(now, 0.9**5 * then + (1 - 0.9**5) * held, SAME) and is_far(now, held, SAME)


def test_a_momentum_of_one_holds_the_teacher_and_a_rising_one_does_at_the_end(task):
    rising = "momentum=0.5,rising=true"
    cases = (("momentum=1", 0.3, 0.0), ("momentum=0.5", 0.3, 0.5), (rising, 0.5, 0.25), (rising, 1.0, 0.0))
    for spec, t, wanted in cases:
        recipe, model = learner(task, f"mhim:{spec}")
        model.progress.fill_(t)
        for p in model.student.parameters():
            p.data += 1.0
        first = [p.clone() for p in model.teacher.parameters()]
        held = [p.clone() for p in model.student.parameters()]
        recipe.after_step(model, min(1.0, t + 0.1))
        for now, then, other in zip(model.teacher.parameters(), first, held, strict=True):
            assert is_close(now - then, wanted * (other - then), SAME, unit=1.0)


def test_the_student_takes_the_layer_over_instances_and_the_teacher_all(task):
    recipe = parse("mhim")
    trained = recipe.build(task, 12)
    before = copy.deepcopy(trained.state_dict())
    model = recipe.learner(task, trained, 12)
    assert isinstance(model, Taught) and model.student is trained
    for name, x in model.student.state_dict().items():
        same = torch.equal(x, before[name])
        assert same == name.startswith(("features.", "mean", "deviation")) and torch.equal(
            model.teacher.state_dict()[name], before[name]
        )
    all_of_it = parse("mhim:initial=all").learner(task, copy.deepcopy(trained), 12).student
    now = trained.state_dict()
    assert all(torch.equal(x, now[name]) for name, x in all_of_it.state_dict().items())


def test_the_base_model_is_trained_before_for_the_steps_that_are_asked_for(task):
    asked = []

    def fit(module, batches, loss, steps):
        asked.append((module, steps, float(loss(module, batches(np.random.default_rng(0))).detach()) > 0))

    model = parse("mhim").build(task, 12)
    for spec in ("mhim", "mhim:before=0.4", "mhim:before=0"):
        parse(spec).start(task, model, fit)
    assert asked == [(model, 5, True), (model, 2, True)]


def trained(task, spec="", kind="abmil"):
    arm = Arm("own", spec) if spec else Arm("own", options={"reference": kind})
    run = RunContext(Trainable(), (Arm("base", options={"reference": kind}), arm), device=torch.device("cpu"))
    return FieldTraining(task, run, arm).train(0, 3e-3).model.state_dict()


@pytest.mark.parametrize("base", ["abmil", "bag_transformer"])
def test_with_nothing_hidden_and_no_teacher_it_is_the_base_model_bit_for_bit(base):
    task = BagLabels(dataset="digits", dim=8, batch=6, steps=4, rates=(3e-3,), dropout=0.2, heads=2)
    plain, own = trained(task, kind=base), trained(task, f"{FREE},base={base}", kind=base)
    assert plain.keys() == own.keys() and all(torch.equal(x, own[name]) for name, x in plain.items())
    for other in ("high=0.1", "random=0.2", "weight=0.5", "before=1"):  # controls: each of them is another training
        key = other.partition("=")[0]
        fields = [field for field in FREE[5:].split(",") if field.partition("=")[0] != key]
        changed = trained(task, f"mhim:{','.join([*fields, other])},base={base}", kind=base)
        assert any(not torch.equal(x, changed[name]) for name, x in plain.items())


def test_the_teacher_may_be_what_is_used(task):
    made = {use: trained(task, f"mhim:momentum=0.7,use={use}") for use in ("student", "teacher")}
    assert any(not torch.equal(x, made["teacher"][name]) for name, x in made["student"].items())
    recipe, model = learner(task, "mhim:momentum=0.5,use=teacher")
    for p in model.student.parameters():
        p.data += 1.0
    recipe.after_step(model, 0.9)
    assert not torch.equal(model.student.pool.head.weight, model.teacher.pool.head.weight)
    recipe.after_step(model, 1.0)
    assert torch.equal(model.student.pool.head.weight, model.teacher.pool.head.weight)


def test_pictures_show_attention_over_instances():
    task = BagLabels(dataset="digits", dim=8, dropout=0.0)
    samples = [*task.samples("test")[:2]]
    short = torch.arange(60) < torch.tensor([60, 20])[:, None]
    for base in ("abmil", "dsmil"):
        recipe = Mhim(base=base)
        model = recipe.build(task, 12).eval()
        with torch.no_grad():
            (shown,) = recipe.pictures(model, {**task.collate(samples), "mask": short})
            scores = model.read(task.collate(samples)["inputs"], short).scores[:, 0]
        assert shown.rows == [s.name for s in samples] and len(shown.columns) == 60
        values = torch.tensor(shown.values)
        assert values.isnan().sum(1).tolist() == [0, 40] and is_close(values.nan_to_num(0).max(1).values, torch.ones(2))
        assert values[0].argmax() == scores[0].argmax() and values[1].nan_to_num(-1).argmax() == scores[1].argmax()


@pytest.mark.parametrize("spec", ["mhim:high=1", "mhim:share=0", "mhim:momentum=1.5", "mhim:base=mean_of_bag"])
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="mhim"):
        parse(spec)
