# SPDX-License-Identifier: Apache-2.0
"""Figures of generated texts by hand, curves that are known, and frontiers of a chain and of a tiny model."""

import math

import numpy as np
import pytest
import torch

from manyheads import UserError
from manyheads.data.texts import Text
from manyheads.experiment import Arm, CausalLM, RunContext
from manyheads.tasks.text._frontier import at_level, cut_of, pseudo_values
from manyheads.tasks.text._written import cells, distinct, mauve, self_bleu
from manyheads.tasks.text.chain_frontier import ChainFrontier, counted, spelled
from manyheads.tasks.text.continuations import Continuations
from manyheads.tasks.text.sampling_frontier import SamplingFrontier
from tiny import compare as tiny
from tolerance import assert_close, is_far, nearly

texts, tokenizer, model = tiny.texts, tiny.tokenizer, tiny.model
ARMS = (
    Arm("nucleus, local", "sampling:top_p=0.9"), Arm("nucleus, global", "lnd:top_p=0.9"),
    Arm("top-k, local", "sampling:top_k=4"), Arm("top-k, global", "lnd:top_k=4"),
)  # fmt: skip


def test_self_bleu_is_1_of_equal_texts_and_what_the_formula_says_of_others():
    assert self_bleu([[1, 2, 3, 4, 5]] * 3) == nearly(1.0)
    one, other = [1, 2, 3, 9], [1, 2, 3, 8, 7]
    # 3 of 4 words, 2 of 3 pairs, 1 of 2 triples and none of 1, those above words smoothed by one; and a word too few.
    mine = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25 * math.exp(1 - 5 / 4)
    theirs = (3 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert self_bleu([one, other]) == nearly((mine + theirs) / 2)
    assert self_bleu([one, [3, 2, 1, 8, 7]]) < self_bleu([one, other]) < 1
    # A word counts as often as one reference has it: once of three, not three times.
    assert self_bleu([[1, 1, 1], [1, 2, 3]], order=1) == nearly(1 / 3)
    assert self_bleu([[1, 2], []]) == 0.0


def test_distinct_bigrams():
    assert distinct([[1, 2, 1, 2], [1, 2]]) == nearly(2 / 4)
    assert distinct([[1, 2, 3], [4, 5]]) == 1.0 and distinct([[1], []]) == 1.0


def test_mauve_of_equal_and_of_parted_histograms_and_by_hand():
    assert mauve([3, 1, 4], [6, 2, 8]) == nearly(1.0, steps=10_000)
    assert mauve([1, 0], [0, 1]) < 0.05 < mauve([0.9, 0.1], [0.5, 0.5])
    assert mauve([1, 2, 5], [5, 2, 1]) == pytest.approx(mauve([5, 2, 1], [1, 2, 5]), abs=1e-12)
    # Apart, a mixture of shares s and 1 - s has the divergences -log s and -log(1 - s): the curve (s^5, (1 - s)^5).
    s = np.linspace(0, 1, 20_001)
    area = float(np.trapezoid((1 - s) ** 5, s**5))
    assert mauve([1, 0], [0, 1]) == pytest.approx(area, rel=0.05) and mauve([1, 0], [0.1, 0.9]) > 1.5 * area


def test_cells_are_the_clusters_of_points():
    points = torch.randn(60, 8, generator=torch.Generator().manual_seed(1)) * 0.05
    own = torch.arange(60) % 3
    points = points + 3 * torch.eye(8)[own]
    found = cells(points, 3)
    assert all(len(found[own == i].unique()) == 1 for i in range(3)) and len(found.unique()) == 3
    assert len(cells(points, 2).unique()) == 2


def test_pseudo_values_are_the_values_of_a_mean_and_take_bias_off_a_square():
    values = np.array([1.0, 4.0, 2.0, 9.0])
    assert_close(pseudo_values(lambda rows: values[rows].mean(), 4), values)
    squares = pseudo_values(lambda rows: values[rows].mean() ** 2, 4)
    wanted = values.mean() ** 2 - values.var(ddof=1) / 4
    assert float(squares.mean()) == nearly(wanted) and abs(values.mean() ** 2 - wanted) > 1
    assert pseudo_values(lambda rows: values[rows].sum(), 1).tolist() == [1.0]


def test_a_curve_is_read_between_its_points_and_nowhere_else():
    x, y = np.array([2.0, 0.0, 1.0]), np.array([20.0, 0.0, 5.0])
    assert at_level(x, y, 1.5) == nearly(12.5) and at_level(x, y, 0.5) == nearly(2.5)
    assert math.isnan(at_level(x, y, 2.1)) and math.isnan(at_level(x, y, -0.1))


@pytest.mark.parametrize("spec", ["sampling", "sampling:top_k=3,temperature=0.5", "keydiff:budget=0.5", ""])
def test_a_frontier_needs_one_parameter(spec):
    with pytest.raises(UserError, match="as in lnd:top_k=40"):
        cut_of(Arm("it", spec))
    assert "lnd:top_k=40" in ChainFrontier().unsupported_reason(RunContext(None, (Arm("it", spec),)))
    assert cut_of(ARMS[3])[1] == "top_k"


def test_letters_of_a_text_and_what_is_counted():
    assert spelled("Ab,  c!").tolist() == [1, 2, 0, 3, 0]
    letters = spelled("abcab" * 400)
    log_p, after, start = counted(letters, 1)
    assert log_p.shape == (27, 27) and start.sum() == nearly(1.0)
    assert_close(log_p.exp().sum(1), torch.ones(27).double())
    below = (torch.bincount(letters, minlength=27) + 5 / 27) / (len(letters) + 5)
    seen = torch.bincount(letters[1:][letters[:-1] == 1], minlength=27)
    assert_close(log_p[1].exp(), (seen + 5 * below) / (seen.sum() + 5))
    assert is_far(log_p[1].exp(), seen / seen.sum())
    assert after[1, 2] == 2 and counted(letters, 2)[1][27 * 1 + 2, 3] == 27 * 2 + 3


def rows_of(task, run):
    found = {}
    for row in task.measure(run, task.units(run)[0]):
        found.setdefault((row.metric, row.arm, *row.at.values()), []).append(row.value)
    return {key: np.array(values) for key, values in found.items()}


def test_a_chain_in_figures():
    rng = np.random.default_rng(0)
    words = ["the", "of", "water", "mill", "stone", "a", "bird", "sang", "quite", "zebra"]
    said = [Text(f"{i}", " ".join(rng.choice(words, 6000, p=np.linspace(1, 3, 10) / 20))) for i in range(2)]
    task = ChainFrontier(order=1, steps=6, samples=2, top_k=(2, 4, 8), top_p=(0.3, 0.6, 0.9), masses=(0.85,))
    found = rows_of(task, RunContext(None, ARMS, data={"texts": said}))
    for cut, values in (("top-k", ("top_k=2", "top_k=4")), ("nucleus", ("top_p=0.3", "top_p=0.6"))):
        for value in values:
            local, whole = (
                {m: found[m, f"{cut}, {law}", value] for m in ("nll", "entropy")} for law in ("local", "global")
            )
            reward = {law: x["entropy"] - x["nll"] for law, x in (("local", local), ("global", whole))}
            assert (reward["global"] > reward["local"]).all()
            assert_close(reward["global"], found["pressure", f"{cut}, global", value], unit=1.0)
            assert is_far(reward["local"], found["pressure", f"{cut}, local", value], unit=1.0)
            apart = reward["global"] - reward["local"]
            assert_close(apart, found["distortion", f"{cut}, local", value], unit=1.0)
    assert found["excess", "top-k, local", 0.6] == pytest.approx(
        found["nll_at_entropy", "top-k, local", 0.6] - found["nll_at_entropy", "nucleus, local", 0.6]
    )
    at_mass = {arm for metric, arm, *_ in found if metric == "distortion_at_mass"}
    assert at_mass == {"top-k, local", "nucleus, local"}
    with pytest.raises(UserError, match="letters are needed"):
        rows_of(ChainFrontier(samples=3), RunContext(None, ARMS, data={"texts": said}))


@pytest.fixture(scope="module")
def run(model, tokenizer, texts):
    return RunContext(CausalLM("tiny", model, tokenizer), ARMS, data={"texts": texts})


def test_a_model_in_figures(run, model):
    task = SamplingFrontier(
        length=24, tokens=5, copies=3, samples=2, particles=4, top_k=(2, 30), top_p=(0.3, 0.9), masses=(), encoder=""
    )
    assert task.unsupported_reason(run) is None
    found = rows_of(task, run)
    for law in ("local", "global"):
        x = {m: found[m, f"top-k, {law}", "top_k=2"] for m in ("nll", "entropy", "pressure", "mass")}
        assert_close(x["entropy"], x["nll"] + x["pressure"], 1e-6)
        counts = found["effective", f"top-k, {law}", "top_k=2"]
        assert (counts == 1).all() if law == "local" else ((counts > 0.25) & (counts < 1)).all()
        assert (x["pressure"] < 0).all() and ((x["mass"] > 0) & (x["mass"] < 1)).all()
        assert x["entropy"].mean() < math.log(2) < found["entropy", f"top-k, {law}", "top_k=30"].mean()
        assert (
            found["self_bleu", f"top-k, {law}", "top_k=2"].mean()
            > found["self_bleu", f"top-k, {law}", "top_k=30"].mean()
        )
    assert (
        rows_of(task, run)["nll", "top-k, local", "top_k=30"].tolist()
        == found["nll", "top-k, local", "top_k=30"].tolist()
    )
    with pytest.raises(UserError, match="2 copies"):
        SamplingFrontier(copies=1)


def test_continuations_of_any_arm(run, model, monkeypatch):
    arms = (Arm("full"), Arm("drawn", "sampling:temperature=3"), Arm("whole", "lnd:top_k=3,particles=2"))
    run = RunContext(run.subject, arms, data=run.data)
    task = Continuations(lengths=(32,), samples=3, tokens=6, copies=2, encoder="")
    found = {}
    for unit in task.units(run):
        for row in task.measure(run, unit):
            found.setdefault((row.metric, row.arm), []).append(row.value)
    assert found["self_bleu", "full"] == [nearly(1.0)] * 3 and max(found["self_bleu", "drawn"]) < 0.9
    assert np.mean(found["distinct", "full"]) < np.mean(found["distinct", "drawn"])
    ids = task._ids(run)[:1, : -2 * 6]
    made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with torch.inference_mode():
        likely = model(made).logits[0, len(ids[0]) - 1 : -1].double().log_softmax(-1)
    wanted = -likely.gather(1, made[0, len(ids[0]) :, None]).mean()
    assert found["nll", "full"][0] == pytest.approx(float(wanted), abs=1e-4)
    assert found["nll", "full"][0] < min(found["nll", "drawn"])
    with pytest.raises(UserError, match="2 copies"):
        Continuations(copies=1)


def test_mauve_of_written_texts_beside_what_follows(run, monkeypatch):
    """An encoder that tells texts by their first letter: what is copied from the text is as human as it gets."""

    def reads(model, tokenizer, said, most=128):
        return torch.nn.functional.normalize(torch.tensor([[float(ord(x[:1] or " ") > 100), 1.0] for x in said]), dim=1)

    for module in ("continuations", "sampling_frontier"):
        monkeypatch.setattr(f"manyheads.tasks.text.{module}.reader", lambda run, model: (None, None))
        monkeypatch.setattr(f"manyheads.tasks.text.{module}.embedded_texts", reads)
    task = Continuations(lengths=(32,), samples=4, tokens=3, copies=3)
    monkeypatch.setattr(Continuations, "_written", lambda self, run, arm, ids: written[arm.key])
    human = task._ids(run)[:, -9:].reshape(4, 3, 3).tolist()
    written = {ARMS[0].key: human, ARMS[1].key: [[[7, 7, 7]] * 3] * 4}
    values = [[row.value for row in task.measure(run, unit) if row.metric == "mauve"] for unit in task.units(run)[:2]]
    assert np.mean(values[0]) == nearly(1.0, steps=10_000) and np.mean(values[1]) < 0.9
    frontier = SamplingFrontier(length=24, tokens=4, copies=3, samples=2, particles=2, top_k=(2, 30), top_p=(0.5, 0.9))
    found = rows_of(frontier, run)
    assert len(found["mauve", "top-k, local", "top_k=2"]) == len(found["mauve_at_entropy", "nucleus, global", 0.6]) == 2
