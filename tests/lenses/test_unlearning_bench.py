# SPDX-License-Identifier: Apache-2.0
"""Unlearning: losses equal their formulas, gradients are balanced, heads alone change, and the model before stays."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import manyheads
from manyheads.data import scenes
from manyheads.data.fictitious import WORDS, Benchmark, world
from manyheads.errors import UserError
from manyheads.integrations.head_weights import head_parts
from manyheads.lenses.unlearning_bench import BalancedGradientDifference, KLMinimization
from manyheads.lenses.unlearning_bench.attribution import importance
from manyheads.lenses.unlearning_bench.losses import answer_nll, balanced, kl, log_probability, npo
from manyheads.models import joined_vlm
from manyheads.recipes import unlearning_bench as recipe
from manyheads.strategy import AttentionWatch
from manyheads.training.answers import answer_loss
from manyheads.unlearning import Answers
from tolerance import CLOSE, FORMULA, GRADIENT, assert_close, is_close, is_far

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
SLUG = "unlearning_bench"
BATCHES = ("person", "event", "retain")


def said(seed, count=5, places=3, words=7):
    """Logits that have gradients; answers of one to three tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, places, words, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = torch.randint(words, (count, places), generator=generator)
    lengths = 1 + torch.arange(count) % places
    return Answers(logits, torch.where(torch.arange(places) < lengths[:, None], tokens, -100))


def reading(seed=0):
    """All batches of a step, of a model, of its refusals, and of the model before."""
    now, refused, before = (
        {name: said(seed + 10 * j + i) for i, name in enumerate(BATCHES)} for j in range(3)
    )  # fmt: skip
    before = {name: Answers(x.logits.detach(), now[name].tokens) for name, x in before.items()}
    made = SimpleNamespace(
        concepts=["person", "event"], forget=now.__getitem__, refused=refused.__getitem__,
        retain=lambda: now["retain"], before=before.__getitem__,
    )  # fmt: skip
    return made, now, refused, before


def token_probabilities(answers):
    """For each answer the probabilities of its tokens, from the formula."""
    made = []
    for row, tokens in zip(answers.logits, answers.tokens.tolist(), strict=True):
        made.append([
            torch.exp(x[t]) / torch.exp(x).sum() for x, t in zip(row, tokens, strict=True) if t >= 0
        ])  # fmt: skip
    return made


def nll_of(answers):
    each = [p for row in token_probabilities(answers) for p in row]
    return -torch.stack(each).log().mean()


def npo_of(answers, before, beta):
    made = []
    for mine, old in zip(token_probabilities(answers), token_probabilities(before), strict=True):
        ratio = torch.stack(mine).prod() / torch.stack(old).prod()
        made.append(2 / beta * torch.log(1 + ratio**beta))  # - log sigmoid(- beta log r)
    return torch.stack(made).mean()


def kl_of(before, answers):
    made = []
    for old, new, tokens in zip(before.logits, answers.logits, answers.tokens, strict=True):
        for a, b, t in zip(old, new, tokens.tolist(), strict=True):
            if t >= 0:
                p, q = torch.exp(a) / torch.exp(a).sum(), torch.exp(b) / torch.exp(b).sum()
                made.append((p * torch.log(p / q)).sum())
    return torch.stack(made).mean()


def formula(part, now, refused, before, sign=-1):
    """A strategy's loss; ``sign`` turned is what a wrong one would make small."""
    forgotten = sum(nll_of(now[c]) for c in ("person", "event")) / 2
    kept = nll_of(now["retain"])
    return {
        ".gradient_ascent": sign * forgotten,
        ".gradient_difference": sign * forgotten + kept,
        ".gradient_difference:forget=0.5,retain=2": 0.5 * sign * forgotten + 2 * kept,
        ".gradient_difference:forget=0": kept,
        ".kl_minimization:retain=3": sign * forgotten + 3 * kl_of(before["retain"], now["retain"]),
        ".preference": -sign * sum(nll_of(refused[c]) for c in ("person", "event")) / 2 + kept,
        ".negative_preference:beta=0.3": -sign * sum(npo_of(now[c], before[c], 0.3) for c in ("person", "event")) / 2
        + kept,
        ".task_vector": -sign * forgotten,
        "": sign * 2 * forgotten + kept,
    }[part]


PARTS = (
    ".gradient_ascent", ".gradient_difference", ".gradient_difference:forget=0.5,retain=2",
    ".gradient_difference:forget=0", ".kl_minimization:retain=3", ".preference", ".negative_preference:beta=0.3",
    ".task_vector", "",
)  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_terms_add_up_to_the_formula_with_its_gradients(part):
    read, now, refused, before = reading()
    strategy = manyheads.parse(SLUG + part)
    leaves = [x.logits for x in (*now.values(), *refused.values())]

    def slopes(loss):
        found = torch.autograd.grad(loss, leaves, allow_unused=True)
        return torch.cat([torch.zeros_like(x).flatten() if g is None else g.flatten()
                          for x, g in zip(leaves, found, strict=True)])  # fmt: skip

    each = list(strategy.terms(read))
    terms, want = sum(each), formula(part, now, refused, before)
    assert_close(terms, want, FORMULA, unit=sum(abs(float(x.detach())) for x in each))
    found = slopes(terms)
    assert_close(found, slopes(want), FORMULA)
    if "forget=0" not in part or "0.5" in part:
        assert is_far(found, slopes(formula(part, now, refused, before, sign=1)), FORMULA)  # the sign turned


def test_what_is_kept_is_held_by_what_the_model_said_before_and_not_the_other_way_round():
    _, now, _, before = reading()
    found = kl(before["retain"], now["retain"])
    assert_close(found, kl_of(before["retain"], now["retain"]), FORMULA)
    turned = Answers(before["retain"].logits, now["retain"].tokens)
    assert is_far(found, kl_of(now["retain"], turned), FORMULA)  # control: the direction turned
    assert float(kl(now["retain"], now["retain"]).detach()) == 0
    assert_close(log_probability(now["event"]).exp(), torch.stack([
        torch.stack(row).prod() for row in token_probabilities(now["event"])
    ]), FORMULA)  # fmt: skip


def test_negative_preference_is_ascent_where_beta_is_small_and_ends_where_it_is_not():
    _, now, _, before = reading()
    mine, old = now["person"], before["person"]

    def slope(loss):
        return torch.autograd.grad(loss, mine.logits, retain_graph=True)[0]

    ascent = slope(log_probability(mine).mean())
    assert is_close(slope(npo(old, mine, 1e-9)), ascent, CLOSE)
    assert is_far(slope(npo(old, mine, 1.0)), ascent, CLOSE)  # control
    gone = Answers(mine.logits - 40 * torch.nn.functional.one_hot(mine.tokens.clamp(min=0), 7), mine.tokens)
    found = torch.autograd.grad(npo(old, gone, 1.0), mine.logits)[0]
    assert float(found.abs().max()) < 1e-9 < 1e-3 < float(slope(-answer_nll(gone)).abs().max())


def balanced_of(gradients, norms=True):
    """From the formula, on lists of numbers."""
    flat = [[float(x) for g in each for x in g.flatten()] for each in gradients]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    if norms:
        lengths = [dot(g, g) ** 0.5 for g in flat]
        middle = sorted(lengths)[(len(lengths) - 1) // 2]
        flat = [[x * middle / n for x in g] for g, n in zip(flat, lengths, strict=True)]
    made = [list(g) for g in flat]
    for i, mine in enumerate(made):
        for j, other in enumerate(flat):
            along = dot(mine, other)
            if i != j and along < 0:
                mine[:] = [x - along / dot(other, other) * y for x, y in zip(mine, other, strict=True)]
    return torch.tensor([sum(x) for x in zip(*made, strict=True)])


@pytest.mark.parametrize("norms", [True, False])
def test_gradients_are_balanced_by_the_formula(norms):
    generator = torch.Generator().manual_seed(4)
    shapes = ((3, 2), (4,))
    gradients = [[s * torch.randn(shape, generator=generator) for shape in shapes] for s in (1.0, 5.0)]
    gradients.append([0.1 * torch.randn(x.shape, generator=generator) - 0.2 * x for x in gradients[0]])  # at odds
    found = balanced(gradients, norms=norms)
    assert [g.shape for g in found] == [(3, 2), (4,)]
    flat = torch.cat([g.flatten() for g in found])
    assert_close(flat, balanced_of(gradients, norms), CLOSE)
    assert is_far(flat, balanced_of(gradients, not norms), CLOSE)  # control
    assert is_far(flat, torch.cat([g.flatten() for g in balanced(gradients, project=False, norms=norms)]), CLOSE)


def test_what_is_protected_is_not_gone_against():
    forget, keep = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 1.0, 0.0])
    plain = balanced([[forget], [keep]], project=False)[0]
    found = balanced([[forget], [keep]])[0]
    assert forget @ keep < 0 <= min(float(found @ keep), float(found @ forget))
    strong = balanced([[10 * forget], [keep]], project=False, norms=False)[0]
    assert strong @ keep < 0  # control: added as they are, the stronger wins
    assert is_far(found, plain, CLOSE)
    alone = balanced([[forget], [forget]])[0]
    assert_close(alone, 2 * forget, CLOSE)  # no conflict, nothing is taken out


def test_a_task_vector_goes_the_other_way():
    before, after = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])
    vector = manyheads.parse(f"{SLUG}.task_vector:alpha=0.5")
    assert vector.merged(before, after).tolist() == [0.5, 3.0]
    assert vector.merged(before, after, 0.5).tolist() == [0.75, 2.5]
    assert manyheads.parse(f"{SLUG}.preference").merged(before, after).tolist() == [2.0, 0.0]  # control


@pytest.mark.parametrize(
    ("spec", "says"),
    [("task_vector:alpha=0", "above 0"), ("negative_preference:beta=0", "above 0"),
     ("gradient_difference:forget=0,retain=0", "not both 0")],
)  # fmt: skip
def test_strengths_that_mean_nothing_are_refused(spec, says):
    with pytest.raises(UserError, match=says):
        manyheads.parse(f"{SLUG}.{spec}")


@pytest.fixture(scope="module")
def known():
    """A tiny model that has learned a tiny world, and its weights."""
    if not scenes.available():
        pytest.skip("CIFAR-10 and Noto Emoji are not on this machine")
    torch.manual_seed(0)
    vlm = joined_vlm.small(patches=3, size=8, dim=32, layers=2, heads=4, words=WORDS)
    bench = Benchmark(world(3, 3), vlm.language, 24, 3, people=1, events=1, views=1)
    recipe.learn(vlm, bench, steps=40, batch=8, lr=5e-3)
    return vlm, bench, {name: p.detach().clone() for name, p in vlm.model.named_parameters()}


@pytest.fixture
def fresh(known):
    vlm, bench, weights = known
    vlm.model.load_state_dict(weights, strict=False)
    return vlm, bench


def changed(vlm, weights):
    return {name for name, p in vlm.model.named_parameters() if not torch.equal(p, weights[name])}


@needs_data
def test_heads_alone_change_where_they_are_named(fresh, known):
    vlm, bench = fresh
    weights = known[2]
    done = recipe.unlearn(vlm, f"{SLUG}:heads=0.1+1.3", bench, steps=2, batch=4, drop=1)
    decoder, found = vlm.model.model.language_model, changed(vlm, weights)
    parts = head_parts(decoder, ["0.1", "1.3"], "qkvo")
    own = {id(p): (dim, rows) for p, dim, rows in parts}
    assert done.trained == sum(p.index_select(d, torch.tensor(r)).numel() for p, d, r in parts)
    assert found == {name for name, p in vlm.model.named_parameters() if id(p) in own} and len(found) == 8
    for name, p in vlm.model.named_parameters():
        if id(p) in own:
            dim, rows = own[id(p)]
            others = torch.tensor([i for i in range(p.shape[dim]) if i not in rows])
            assert torch.equal(p.index_select(dim, others), weights[name].index_select(dim, others))
    assert all(p.requires_grad for p in vlm.model.parameters())
    recipe.unlearn(vlm, f"{SLUG}.gradient_difference:layers=1", bench, steps=1, batch=4, drop=1)
    assert changed(vlm, weights) - found == {
        f"model.language_model.{name}" for name, _ in decoder.named_parameters() if name.startswith("layers.1.")
    } - found  # fmt: skip
    recipe.unlearn(vlm, SLUG, bench, steps=1, batch=4, drop=1)
    assert len(changed(vlm, weights)) > 20  # control: everything
    with pytest.raises(UserError, match="nothing in these layers"):
        recipe.unlearn(vlm, f"{SLUG}:layers=7", bench, steps=1)
    with pytest.raises(UserError, match="makes no model forget"):
        recipe.unlearn(vlm, "ablate:heads=0.1", bench, steps=1)


@needs_data
def test_the_model_before_stays_as_it_was(fresh):
    vlm, bench = fresh
    seen = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Looks(KLMinimization):
        def terms(self, read):
            seen.append((read.before("retain").logits, read.retain().logits.detach(), read.given["retain"]))
            assert not seen[-1][0].requires_grad
            yield from super().terms(read)

    recipe.unlearn(vlm, Looks(), bench, steps=3, batch=64, lr=5e-3, drop=1)
    order = [sorted(range(len(items)), key=lambda i, items=items: str(items[i])) for *_, items in seen]
    count = len(bench.trained["retain"])
    assert count <= 64  # so that the first of each step are all of them
    by_item = [{str(item): i for i, item in enumerate(items)} for *_, items in seen]
    common = sorted(set(by_item[0]) & set(by_item[2]))
    assert len(common) == count and order
    for which, alike in ((0, True), (1, False)):  # the model before; control: the model
        first, last = (
            torch.stack([seen[i][which][by_item[i][name]][0] for name in common]) for i in (0, 2)
        )  # fmt: skip
        assert is_close(first, last, GRADIENT) == alike
    assert_close(seen[0][0], seen[0][1], GRADIENT)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Forgot(Looks):
        refers = False

    with pytest.raises(ValueError, match="refers"):
        recipe.unlearn(vlm, Forgot(), bench, steps=1)


@needs_data
def test_the_loop_gives_the_optimiser_balanced_gradients(fresh):
    vlm, bench = fresh
    parameters = [p for p in vlm.model.parameters() if p.requires_grad]
    step = recipe._Step(vlm, bench, None, {"person": bench.trained["forget person"][:4],
                                           "event": bench.trained["forget event"][:2],
                                           "retain": bench.trained["retain"][:4]})  # fmt: skip
    strategy = BalancedGradientDifference()
    apart = [torch.autograd.grad(term, parameters, allow_unused=True) for term in strategy.terms(step)]
    apart = [
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, x, strict=True)] for x in apart
    ]  # fmt: skip
    for term in recipe._loss(strategy, parameters)(vlm.model, step):
        term.backward()
    found = torch.cat([p.grad.flatten() for p in parameters])
    plain = torch.cat([sum(g).flatten() for g in zip(*apart, strict=True)])
    want = torch.cat([g.flatten() for g in balanced(apart)])
    vlm.model.zero_grad()
    assert_close(found, want, GRADIENT)
    assert is_far(found, plain, GRADIENT)


@needs_data
def test_training_ends_where_too_much_is_lost_with_the_weights_of_before(fresh, known):
    vlm, bench = fresh
    done = recipe.unlearn(vlm, f"{SLUG}.gradient_ascent", bench, steps=20, batch=8, lr=0.1, drop=0.1)
    assert done.steps < 20
    assert done.steps > 0 or not changed(vlm, known[2])
    vector = recipe.unlearn(vlm, f"{SLUG}.task_vector:alpha=1000", bench, steps=2, batch=8, lr=1e-2, drop=0.0)
    assert vector.share < 1
    kept = recipe.unlearn(vlm, f"{SLUG}.gradient_ascent", bench, steps=3, batch=8, lr=0.1, drop=1)
    assert kept.steps == 3 and changed(vlm, known[2])  # control


@needs_data
def test_importance_is_the_slope_in_a_heads_output(fresh):
    vlm, bench = fresh
    batch = recipe.read(vlm, bench, bench.trained["retain"][:4])
    decoder, outputs = vlm.model.model.language_model, []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Keeps(AttentionWatch):
        def watch(self, call, out):
            outputs.append(out)

    table = importance(decoder, manyheads.use, [lambda: answer_loss(vlm.model, batch)], "importance")
    with manyheads.use(decoder, Keeps()):
        loss = answer_loss(vlm.model, batch)
    slopes = torch.autograd.grad(loss, outputs)
    want = torch.stack([(z * g).sum((0, 1, 3)) for z, g in zip(outputs, slopes, strict=True)])
    assert want.shape == (2, 4) and is_close(table.mean, want.abs(), GRADIENT)
    assert is_far(table.mean, want, GRADIENT) and is_far(table.mean, want.abs().flip(1), GRADIENT)  # controls
    assert all(p.grad is None for p in vlm.model.parameters())
    shares = recipe.important_heads(vlm, bench, count=2, batch=4).values
    assert abs(float(shares.sum())) < 1e-9 and float(abs(shares).max()) > 1e-3


@pytest.mark.slow
@needs_data
def test_the_recipe_says_what_is_known_before_and_after(capsys):
    given = ["--people", "3", "--events", "3", "--forget", "1+1", "--learn", "1", "--steps", "1", "--views", "1"]
    assert recipe.main(given) == 0
    assert "forget person, new" in capsys.readouterr().out
    assert recipe.main([*given, "--method", "snapkv"]) == 1
    assert "makes no model forget" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        recipe.main([*given, "--out", "somewhere"])


def test_unlearning_is_nothing_to_open_a_model_with():
    vlm = joined_vlm.small(patches=2, size=2, dim=16, layers=1)
    with pytest.raises(UserError, match="by training it"), manyheads.use(vlm.model, SLUG):
        pass
