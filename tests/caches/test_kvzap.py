# SPDX-License-Identifier: Apache-2.0
"""KVzap and Fast KVzip: predicted scores, what they keep by a threshold or a budget, and how they are trained."""

import copy
import dataclasses
import functools
import importlib
import math

import pytest
import torch

import manyheads
from manyheads import UserError, parse
from manyheads.caches.fastkvzip import FastKVzip, SinkGates
from manyheads.caches.kvzap import KVzap, ScoreNetworks
from manyheads.integrations.transformers import find_sites, new_cache
from manyheads.recipes._kvzip_scores import collect, judged, predicted, train_modules
from oracles import caches, models
from oracles.caches import step
from tolerance import CLOSE, SAME, assert_close

DIM, HEADS, RECENT = 32, {0: 2, 1: 2}, 5


@functools.cache
def modules(kind):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = ScoreNetworks(DIM, HEADS) if kind is KVzap else SinkGates(DIM, HEADS, groups=2, rank=4, others=3)
        for x in made.parameters():
            torch.nn.init.normal_(x, std=1.0)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: str(modules(kind).save(tmp_path_factory.mktemp(kind.__name__))) for kind in (KVzap, FastKVzip)}


@pytest.fixture(scope="module")
def llama():
    return models.tiny("llama", torch.float64)


def by_hand(kind, x, layer):
    """Scores ``[Hkv, T]`` of ``x [T, D]``, one number after the other."""
    state = {name: w.double() for name, w in modules(kind).layer(layer).state_dict().items()}
    scores = torch.zeros(2, len(x), dtype=torch.float64)
    for t, row in enumerate(x.double()):
        if kind is KVzap:
            inner = state["layers.0.weight"] @ row + state["layers.0.bias"]
            inner = torch.tensor([a * 0.5 * (1 + math.erf(a / math.sqrt(2))) for a in inner.tolist()])
            scores[:, t] = state["layers.2.weight"] @ inner.double() + state["layers.2.bias"]
            continue
        q = (state["q.weight"] @ row + state["q.bias"]).view(2, 2, 4)
        k = (state["k.weight"] @ row).view(2, 4)
        for h in range(2):
            key = k[h] / (k[h].square().mean() + 1e-6).sqrt() * state["k_norm"]
            for g in range(2):
                query = q[h, g] / (q[h, g].square().mean() + 1e-6).sqrt() * state["q_norm"]
                own = float(query @ key) / 2 + float(state["bias"][h, g])
                rest = sum(math.exp(float(query @ other) / 2 - own) for other in state["others"][h])
                scores[h, t] += 1 / (1 + rest) / 2
    return scores


def hidden_of(model, ids):
    """What the attention of each layer reads, ``[B, T, D]``."""
    seen, handles = {}, []
    for n, layer in enumerate(model.model.layers):
        handles.append(layer.input_layernorm.register_forward_hook(lambda _m, _i, out, n=n: seen.update({n: out})))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", [KVzap, FastKVzip])
def test_scores_against_loops(kind, llama):
    ids = models.tokens(1, 12)
    for layer, x in hidden_of(llama, ids).items():
        got = modules(kind).placed(layer, x)(x)[0]
        want = by_hand(kind, x[0], layer)
        assert_close(got, want, CLOSE)
        with pytest.raises(AssertionError):
            assert_close(got, by_hand(kind, x[0].roll(1, 0), layer), CLOSE)


@pytest.mark.parametrize("kind", [KVzap, FastKVzip])
def test_a_budget_keeps_the_best_of_the_model(kind, llama, folders):
    ids = models.tokens(1, 40)
    scores = [by_hand(kind, x[0], n) for n, x in hidden_of(llama, ids).items()]
    policy = kind(modules=folders[kind], budget=0.4, sinks=2, recent=RECENT)
    fixed = {*range(2), *range(40 - RECENT, 40)}
    every = [(n, h, j) for n in range(2) for h in range(2) for j in range(40)]
    best = sorted(every, key=lambda s: (s[2] not in fixed, -float(scores[s[0]][s[1], s[2]])))[: 16 * 4]
    with manyheads.use(llama):
        stores = caches.stores(caches.prefilled(llama, policy, ids))
    for n, store in enumerate(stores):
        for h in range(2):
            held = sorted(p for p in store.live.positions()[0, h].tolist() if p >= 0)
            assert held == sorted(j for m, i, j in best if (m, i) == (n, h))


def due(scores, threshold, seen, sinks=2):
    return [
        [j for j in range(seen) if j < sinks or j >= seen - RECENT or float(head[j]) >= threshold] for head in scores
    ]


@pytest.mark.parametrize("kind", [KVzap, FastKVzip])
@pytest.mark.parametrize("schedule", ["prefill", 3])
def test_a_threshold_drops_what_has_left_the_window(kind, schedule, llama, folders):
    """Only the first layer reads the same whatever is dropped; prompt, tokens one by one, and a later piece."""
    whole = models.tokens(1, 34)
    scores = by_hand(kind, hidden_of(llama, whole)[0][0], 0)
    threshold = float(scores.flatten().sort().values[33:35].mean())  # between two of them
    policy = kind(modules=folders[kind], threshold=threshold, sinks=2, recent=RECENT, schedule=schedule)
    seen, decided, fed = 0, [], [20, 1, 1, 1, 1, 6, 1, 1, 1, 1]
    with manyheads.use(llama):
        cache, since = new_cache(llama, policy), 0
        for n in fed:
            step(llama, whole[:, seen : seen + n], cache)
            seen, since = seen + n, since + n
            if seen == n or (schedule == 3 and since >= 3):
                since, decided = 0, [[j for j in head if j < seen] for head in due(scores, threshold, seen)]
                last = seen
            want = [[*head, *range(last, seen)] for head in decided]
            store = caches.stores(cache)[0]
            assert store._copy.positions().max() == seen - 1
            assert [sorted(p for p in head if p >= 0) for head in store._copy.positions()[0].tolist()] == want
    assert any(len(head) < seen for head in want)


def test_what_survived_is_not_decided_on_again_and_scores_are_let_go(llama, folders):
    policy = KVzap(modules=folders[KVzap], threshold=0.0, sinks=2, recent=RECENT, schedule=3)
    with manyheads.use(llama):
        cache = caches.prefilled(llama, policy, models.tokens(2, 30))
        store = caches.stores(cache)[0]
        assert store._scores.shape[2] == RECENT
        once = caches.prefilled(llama, dataclasses.replace(policy, schedule="prefill"), models.tokens(2, 30))
        assert caches.stores(once)[0]._scores is None


ORACLES = [
    caches.batch_equals_singles_padded_left, caches.batch_equals_singles_padded_right, caches.rows_can_be_rearranged,
    caches.two_conversations, caches.protected_stay, caches.on_means_on, caches.slot_order_is_free,
]  # fmt: skip


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("schedule", ["budget", "prefill", 2])
def test_oracles(oracle, schedule, llama, folders):
    more = {"budget": 0.6} if schedule == "budget" else {"threshold": 0.0, "schedule": schedule}
    oracle(llama, KVzap(modules=folders[KVzap], sinks=1, recent=2, **more))


def test_a_prompt_in_chunks_is_compressed_as_one_read_at_once(llama, folders):
    ids = models.tokens(1, 31)
    policy = KVzap(modules=folders[KVzap], budget=0.4, sinks=1, recent=2)
    with manyheads.use(llama):
        whole, parts = new_cache(llama, policy), new_cache(llama, policy)
        manyheads.integrations.transformers.prefill(llama, ids, whole, chunk=31)
        manyheads.integrations.transformers.prefill(llama, ids, parts, chunk=7)
        for one, other in zip(caches.stores(whole), caches.stores(parts), strict=True):
            assert torch.equal(one.live.positions(), other.live.positions())


def test_a_copy_and_a_saved_state_go_on_alike(llama, folders):
    policy = KVzap(modules=folders[KVzap], threshold=0.0, sinks=1, recent=4, schedule=2)
    with manyheads.use(llama):
        cache = caches.prefilled(llama, policy, models.tokens(2, 20))
        other = caches.prefilled(llama, policy, models.tokens(2, 20, seed=9))
        for mine, theirs in zip(caches.stores(cache), caches.stores(other), strict=True):
            theirs.load_state_dict(copy.deepcopy(mine.state_dict()))
        for t in range(4):
            last = models.tokens(2, 1, seed=t)
            assert_close(step(llama, last, other), step(llama, last, cache), SAME)


def test_folders_are_read_again_and_others_refused(folders, tmp_path):
    for kind, folder in folders.items():
        again = kind(modules=folder).trained
        assert again.described == modules(kind).described
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), modules(kind).parameters(), strict=True))
    for text, said in (
        ("kvzap", "needs modules=FOLDER"), (f"kvzap:modules={tmp_path}", "holds no networks"),
        (f"kvzap:modules={folders[FastKVzip]}", "holds no networks"),
        (f"fastkvzip:modules={folders[FastKVzip]},schedule=step", "schedule is prefill"),
        (f"kvzap:modules={folders[KVzap]},schedule=4", "with a threshold"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as error:
            parse(text).store(next(site for site, _ in find_sites(models.tiny("llama"))))
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def examples():
    model = models.tiny("llama")
    pieces = [models.tokens(2, 40, seed=i) for i in range(12)]
    return model, pieces, {plus: collect(model, pieces, 20, plus=plus, instruct=False) for plus in (True, False)}


def test_examples_are_kvzips_scores_of_the_tokens_they_are_of(examples):
    model, pieces, found = examples
    first = found[False]
    assert first.layers == (0, 1) and first.hidden.shape == (480, 2, DIM) and first.scores.shape == (480, 2, 2)
    x, generator = hidden_of(model, pieces[0])[1], torch.Generator().manual_seed(0)
    drawn = 4 + torch.randperm(36, generator=generator)[:20]
    assert_close(first.hidden[:20, 1], x[0, drawn], SAME)
    assert 0 < float(first.scores.min()) <= float(first.scores.max()) <= 1
    assert not torch.equal(first.scores, found[True].scores)


@pytest.mark.parametrize("kind", [KVzap, FastKVzip])
def test_training_learns_the_scores(kind, examples):
    """More of the scores is predicted after training than by their mean; with shuffled scores nothing is learned."""
    found = examples[2][kind is KVzap]
    learned = []
    for wrong in (False, True):
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(len(found.scores), generator=generator) if wrong else torch.arange(len(found.scores))
        mine = dataclasses.replace(found, scores=found.scores[order])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = ScoreNetworks(DIM, HEADS, hidden=16) if kind is KVzap else SinkGates(DIM, HEADS, groups=2, rank=8)
        train = dataclasses.replace(mine, hidden=mine.hidden[:400], scores=mine.scores[:400])
        held = dataclasses.replace(mine, hidden=mine.hidden[400:], scores=mine.scores[400:])
        train_modules(made, train, steps=80, batch=64, lr=1e-2)
        learned.append(judged(made, held))
        assert predicted(made, held).shape == held.scores.shape
    right, wrong = learned
    assert right["r2"] > 0.1 > wrong["r2"]
    assert list(right["thresholds"]) == ["0.5", "0.25", "0.1"]
    assert right["thresholds"]["0.5"] < right["thresholds"]["0.25"] < right["thresholds"]["0.1"]


@pytest.mark.parametrize("slug", ["kvzap", pytest.param("fastkvzip", marks=pytest.mark.slow)])
def test_recipe_from_end_to_end(slug, tmp_path, capsys):
    out, text = tmp_path / slug, tmp_path / "text.py"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(60)))
    recipe = importlib.import_module(f"manyheads.recipes.{slug}")
    some = ["--pieces", "2", "--length", "48", "--tokens", "8", "--steps", "2", "--text", str(text), "--device", "cpu"]
    assert recipe.main(["--out", str(out), *some]) == 0
    assert "R^2" in capsys.readouterr().out
    about = parse(f"{slug}:modules={out}").trained.about
    assert about["text"] == str(text) and about["pieces"] == 2 and set(about["thresholds"]) == {"0.5", "0.25", "0.1"}
    assert recipe.main(["--out", str(out), "--text", str(tmp_path / "nothing")]) == 1
    assert "error:" in capsys.readouterr().err
