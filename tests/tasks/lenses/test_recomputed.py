# SPDX-License-Identifier: Apache-2.0
"""Figures of the tasks on lenses, recomputed one sample at a time and by scipy; models are told what to say."""

import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from manyheads.data.phrases import PhraseLanguage as Language
from manyheads.data.recall_and_facts import facts, recall_and_facts
from manyheads.data.strategy_dialogue import VOCAB, strategy_dialogues
from manyheads.tasks.lenses.peaks_in_text import PeaksInText
from manyheads.tasks.lenses.phrase_language import PhraseLanguage
from manyheads.tasks.lenses.recall_and_facts import KINDS, RecallAndFacts
from manyheads.tasks.lenses.style_dialogue import StyleDialogue
from scipy.stats import mannwhitneyu, spearmanr

import manyheads
from manyheads.data.texts import standard_library
from manyheads.experiment import Arm, CausalLM, RunContext, Trainable
from manyheads.heads import HeadTable
from manyheads.tasks.lenses import peaks_in_text, phrase_language, style_dialogue
from manyheads.tasks.lenses.channel_damage import ChannelDamage
from manyheads.tasks.lenses.channel_norms import ChannelNorms
from manyheads.tasks.lenses.massive_ablation import MassiveAblation
from oracles.tasks import context, rows


@pytest.fixture(scope="module")
def default():
    subject = CausalLM("default")
    subject.load("cpu")
    return subject


def reading(*arms, subject):
    """A run that reads a few files."""
    run = context(*arms, subject=subject)
    run.data = {"texts": standard_library()[:24]}
    return run


def nats(logits, token):
    return math.log(float(logits.double().exp().sum())) - float(logits[token])


def test_what_is_read_and_what_is_known(default):
    arms = (Arm("full"), Arm("top", "massive_values:damage=top,of=qk,channels=4"))
    task, run, found = ChannelDamage(tokens=96, windows_of=2), reading(*arms, subject=default), {}
    for row in rows(task, run):
        found.setdefault((row.arm, row.metric, row.at.get("knowledge")), []).append(row.value)
    planted, model, base = task.contexts(run, 2).single(96), default.model, {}
    for arm in arms:
        want = {name: [] for name in ("constant_found", "new_token", "known_token", "code_nll")}
        with manyheads.use(model, *arm.strategies), torch.no_grad():
            for one in planted:
                (question,) = one.questions
                said = []
                for _ in question.answer:  # without a cache
                    ids = torch.tensor([[*one.ids, *question.question, *said]])
                    said.append(int(model(ids, use_cache=False).logits[0, -1].argmax()))
                want["constant_found"].append(float(said == list(question.answer)))
            for window in task.windows(run):
                logits, hits = model(window[None, :-1], use_cache=False).logits[0], {True: [], False: []}
                for t in range(96):
                    hits[int(window[t + 1]) in window[: t + 1].tolist()].append(
                        float(logits[t].argmax() == window[t + 1])
                    )
                want["known_token"].append(np.mean(hits[True]))
                want["new_token"].append(np.mean(hits[False]))
                want["code_nll"].append(np.mean([nats(logits[t], int(window[t + 1])) for t in range(96)]))
        base = base or want
        for name, values in want.items():
            assert found[arm.key, name, None] == pytest.approx(values, abs=1e-4), name
        for kind, name in (("planted constant", "constant_found"), ("new token", "new_token")):
            whole = max(np.mean(base[name]), 1 / 2)
            assert found[arm.key, "kept", kind] == pytest.approx([value / whole for value in want[name]])


def test_windows_for_two_uses_share_no_token(default):
    task, run = ChannelDamage(tokens=64, windows_of=3), reading(subject=default)
    drawn = [w.tolist() for w in (*task.windows(run), *task.windows(run, "calibration"))]
    assert len(drawn) == 6 and all(len(window) == 65 for window in drawn) and len({tuple(w) for w in drawn}) == 6
    most = default.max_context
    assert "reads" in ChannelDamage(tokens=most + 1).unsupported_reason(run)
    assert ChannelNorms(tokens=most).unsupported_reason(run) is None
    assert "no tokenizer" in ChannelNorms().unsupported_reason(context(subject=CausalLM("recall")))
    for wrong in ({"tokens": 31}, {"windows_of": 1}):
        with pytest.raises(ValueError, match="give 2 windows or more"):
            ChannelNorms(**wrong)
    assert ChannelNorms(tokens=32, windows_of=2).tokens == 32


def test_norms_are_means_of_the_heads_of_a_layer(default):
    """By hand: the norm of each channel over all tokens, the largest over the mean; channels above five times it."""
    task, run = ChannelNorms(tokens=64, windows_of=2), reading(subject=default)
    found = [row for row in rows(task, run) if row.at["of"] == "v"]
    model, kept = default.model, {}
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out, i=i: kept.update({i: out}))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(task.windows(run)[:, :-1])
    for hook in hooks:
        hook.remove()
    dim = model.config.head_dim
    for i, out in kept.items():
        heads = out.double().unflatten(-1, (-1, dim))  # [B, T, Hkv, d]
        peaks, massive = [], []
        for h in range(heads.shape[2]):
            norms = [torch.linalg.norm(heads[n, :, h], dim=0) for n in range(2)]
            peaks.append(np.mean([float(x.max() / x.mean()) for x in norms]))
            massive.append(np.mean([float((x > 5 * x.mean()).sum()) for x in norms]))
        (peak,) = [row.value for row in found if row.metric == "channel_peak" and row.sample == f"layer {i}"]
        assert peak == pytest.approx(np.mean(peaks), rel=1e-3)
        (count,) = [row.value for row in found if row.metric == "massive_channels" and row.sample == f"layer {i}"]
        assert count == pytest.approx(np.mean(massive), abs=1e-6)


def test_what_massive_activations_cost(default):
    arms = (Arm("full"), Arm("control", options={"replace": "control"}))
    task = MassiveAblation(tokens=64, windows_of=3, text="code", ratio=100.0, draws=2)
    run = reading(*arms, subject=default)
    found = rows(task, run)
    assert [unit.cost for unit in task.units(run)] == [1.0, 2.0]
    (first, second), model = task._acting(run, arms[1]), default.model
    layer, spikes = task._layer(run), task._calibrated(run).records["spikes"]
    mine = [spike for spike in spikes if spike["layer"] == layer]
    assert layer == min(spike["layer"] for spike in spikes) and first.layers == (layer,)
    assert set(first.columns) == {spike["column"] for spike in mine}
    assert set(first.channels) == {spike["channel"] for spike in mine} and first.seed != second.seed

    def loss(zeroed):
        def zero(_, __, out):
            made = (out[0] if isinstance(out, tuple) else out).clone()
            for column in first.columns:
                made[:, column, zeroed] = 0
            return (made, *out[1:]) if isinstance(out, tuple) else made

        hook = model.model.layers[layer].register_forward_hook(zero) if zeroed else nullcontext()
        with torch.no_grad():
            got = []
            for window in task.windows(run):
                logits = model(window[None, :-1]).logits[0]
                got.append(np.mean([nats(logits[t], int(window[t + 1])) for t in range(64)]))
        if zeroed:
            hook.remove()
        return np.array(got)

    draws = []
    for one in (first, second):
        order = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(one.seed)).tolist()
        draws.append([c for c in order if c not in one.channels][: len(one.channels)])
    plain, control = loss([]), np.mean([loss(channels) for channels in draws], 0)
    by = {(row.metric, row.arm, row.sample): row.value for row in found}
    for i in range(3):
        assert by["token_nll", "full", f"{i}"] == pytest.approx(plain[i], abs=1e-4)
        assert by["token_nll", "control", f"{i}"] == pytest.approx(control[i], abs=1e-4)
        assert by["added_nll", "control", f"{i}"] == pytest.approx(control[i] - plain[i], abs=2e-4)
    tables = task._calibrated(run).tables
    at = tables["max"].layers.index(layer)
    for i in range(3):
        assert by["largest_activation", "full", f"calibration {i}"] == tables["max"].values[i, at, 0]
        assert by["max_to_median", "full", f"calibration {i}"] == tables["max / median"].values[i, at, 0]


def test_peaks_and_what_they_follow(default, monkeypatch):
    arms = (*(Arm(name, options={"score": name}) for name in ("waad", "fai", "entropy")), Arm("random"))
    run = reading(*arms, subject=default)
    task = PeaksInText(tokens=96, windows_of=2, text="code")
    draw = np.random.default_rng(0)
    made = {i: {name: draw.random(96) for name in ("waad", "fai", "entropy", "random")} for i in range(2)}
    asked = []

    def scores(run, model, ids, first, number):
        asked.append((tuple(ids.shape), first))
        return [made[number]], None

    monkeypatch.setattr(peaks_in_text, "scores", scores)
    found = rows(task, run)
    assert asked == [((1, 96), 32)] * 2
    for row in found:
        score = made[int(row.sample)]
        sizes = {
            len(peaks_in_text.peaks_of(np.where(np.arange(96) >= 32, values, np.nan)).nonzero()[0])
            for values in score.values()
        }
        top = {name: set(np.argsort(-values[32:])[: sizes.copy().pop()] + 32) for name, values in score.items()}
        peaks = top[row.arm]
        if row.metric == "peak_entropy":
            assert row.value == pytest.approx(np.mean([score["entropy"][t] for t in peaks]))
        else:
            follows = [any(t - j in top["waad"] for j in range(4)) for t in peaks]
            assert row.value == pytest.approx(np.mean(follows))
    assert len(found) == 2 * 2 * 4


def test_scores_of_phrases(monkeypatch):
    """AUROC by scipy, of rows that predict a head and of heads; definitions among the peaks; losses by their places."""
    arms = (Arm("blind"), *(Arm(name, options={"score": name}) for name in ("waad", "fai")))
    task, run = PhraseLanguage(length=64, sequences=5), context(*arms, seeds=(3,))
    language = Language.of(0)
    test = language.draw(5, 64, run.torch_rng(test="phrase_language"))
    draw = np.random.default_rng(0)
    made = [{name: draw.random(64) for name in ("waad", "fai", "entropy", "random")} for _ in range(5)]
    for one in made:
        for name in one:
            one[name][:3] = np.nan
    logits = torch.randn(5, 64, language.vocab, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(PhraseLanguage, "_learned", lambda *_: None)
    monkeypatch.setattr(phrase_language, "scores", lambda *_: (made, logits))
    found = rows(task, run)
    assert {row.seed for row in found} == {3}
    for row in found:
        n = int(row.sample)
        score = made[n][{"blind": "random"}.get(row.arm, row.arm)]
        starts, uses = test.starts[n].tolist(), test.uses[n].tolist()
        if row.metric in ("lookup_loss", "phrase_loss"):
            each = [nats(logits[n, t], int(test.ids[n, t + 1])) for t in range(63)]
            places = [
                t
                for t in range(63)
                if (uses[t] if row.metric == "lookup_loss" else not uses[t] and not test.free[n, t])
            ]
            assert row.arm == "blind" and row.value == pytest.approx(np.mean([each[t] for t in places]), rel=1e-5)
        elif row.metric == "definitions_found":
            known = [t for t in range(64) if test.definitions[n, t] and np.isfinite(made[n]["fai"][t])]
            count = int(phrase_language.peaks_of(score).sum())
            top = set(np.argsort(-np.nan_to_num(score, nan=-1))[:count])
            assert row.value == pytest.approx(np.mean([t in top for t in known]))
        else:
            inside = range(10, 63)
            label = [starts[t + 1] if row.metric == "head_auroc" else starts[t] for t in inside]
            high, low = (
                [score[t] for t, yes in zip(inside, label, strict=True) if yes == kind] for kind in (True, False)
            )
            want = mannwhitneyu(high, low).statistic / (len(high) * len(low))
            assert row.value == pytest.approx(want)
    assert {row.metric for row in found} == {metric.name for metric in task.metrics}


def test_a_style_is_followed_if_both_tokens_are(monkeypatch):
    """Replies of which both tokens, one, or none is right; curves over turns by scipy."""
    arms = (Arm("standard"), Arm("c1_hf", options={"form": "c1_hf"}))
    task, run = StyleDialogue(words=3, turns=(1, 2, 4), dialogues=6), context(*arms, seeds=(2,))
    asked = []

    class Says:
        def __call__(self, ids):
            said = torch.nn.functional.one_hot(ids.roll(-1, 1), VOCAB).float()
            turns = asked[-1][0]
            said[turns:, -2] = 0  # the last token is wrong from this row on
            said[4:, -3] = 0  # and the one before it
            return SimpleNamespace(logits=said)

    def table(seed):
        return HeadTable("sra", ("a", "b"), np.random.default_rng(seed).random((6, 2, 3)))

    @contextmanager
    def watch(model, *lenses, roles):
        turns = asked[-1][0]
        (system,), (beside,), (response,) = (roles.spans[name] for name in ("system", "beside", "response"))
        asked[-1] += (system, beside, response)
        yield SimpleNamespace(
            compute=lambda i: SimpleNamespace(tables={"sra": table(10 * turns + i), "lift": table(100 * turns + i)})
        )

    real = style_dialogue.strategy_dialogues

    def dialogues(count, turns, form, source, words):
        made = real(count, turns, form, source, words)
        asked.append((turns, form, made))
        return made

    monkeypatch.setattr(StyleDialogue, "_learned", lambda *_: Says())
    monkeypatch.setattr(style_dialogue, "strategy_dialogues", dialogues)
    monkeypatch.setattr(manyheads, "watch", watch)
    found = rows(task, run)
    assert [(turns, form) for turns, form, *_ in asked] == [
        (1, "standard"),
        (2, "standard"),
        (4, "standard"),
        (4, "c1_hf"),
    ]
    for _, _, made, system, beside, response in asked:
        assert system == [made.system] and beside == [made.beside]
        assert response == [(made.ids.shape[1] - 3, made.ids.shape[1] - 1)]
    curves = {}
    for turns, arm in ((1, "standard"), (2, "standard"), (4, "standard"), (4, "c1_hf")):
        want = {
            "accuracy": [float(i < min(turns, 4)) for i in range(6)],
            "sra": [table(10 * turns).values[i].mean() for i in range(6)],
            "lift": [table(100 * turns).values[i].mean() for i in range(6)],
            "sra_beside": [table(10 * turns + 1).values[i].mean() for i in range(6)],
            "sra_last_layer": [table(10 * turns).values[i, 1].mean() for i in range(6)],
        }
        for name, values in want.items():
            mine = [r.value for r in found if (r.metric, r.arm, r.at.get("turns")) == (name, arm, turns)]
            assert mine == pytest.approx(values), name
            if arm == "standard":
                curves.setdefault(name, []).append(np.mean(values))
    right = curves.pop("accuracy")
    for name, curve in curves.items():
        (row,) = [row for row in found if row.metric == "goes_with_accuracy" and row.at == {"of": name}]
        assert row.value == pytest.approx(spearmanr(right, curve).statistic) and row.arm == "standard"
    assert {row.seed for row in found} == {2}


def test_questions_are_answered_by_their_kind(monkeypatch):
    arms = (Arm("full"), Arm("all", "massive_values:damage=top,of=v,by=zero,channels=16"))
    task, run = RecallAndFacts(questions=40), RunContext(Trainable(), arms, seeds=(6,))
    run.subject.load("cpu")
    torch.manual_seed(0)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids, label, kind = recall_and_facts(40, facts(), run.torch_rng(test="recall_and_facts"))
    with torch.no_grad():  # it answers every third question rightly, by its bias towards what is asked
        best = model(ids).logits[:, -1].argmax(-1)
    monkeypatch.setattr(RecallAndFacts, "_learned", lambda *_: model)
    monkeypatch.setattr(
        "manyheads.tasks.lenses.recall_and_facts.recall_and_facts",
        lambda *given: (ids, torch.where(torch.arange(40) % 3 == 0, best, label), kind),
    )
    label = torch.where(torch.arange(40) % 3 == 0, best, label)
    found = rows(task, run)
    for arm in arms:
        with manyheads.use(model, *arm.strategies), torch.no_grad():
            for i in range(40):
                (row,) = [row for row in found if (row.arm, row.sample) == (arm.key, f"{i}")]
                said = int(model(ids[i : i + 1]).logits[0, -1].argmax())
                assert row.value == float(said == label[i]) and row.at == {"asks": KINDS[kind[i]]} and row.seed == 6
    assert 0.3 < np.mean([row.value for row in found if row.arm == "full"]) < 0.7


def test_a_dialogue_stands_as_its_form_says():
    """The picture of the module, token by token, for each layout."""
    generator = torch.Generator().manual_seed(0)
    for form in ("standard", "c1_hf", "c1_hl"):
        made = strategy_dialogues(3, 2, form, generator, words=3)
        start, stop = made.system
        assert (made.ids[:, start] == 1).all() and stop == start + 2
        assert made.beside == (start + 3, start + 5)
        style = made.ids[:, start + 1] - 5
        assert torch.equal(made.ids[:, -2], 20 + style // 4) and torch.equal(made.ids[:, -1], 24 + style % 4)
