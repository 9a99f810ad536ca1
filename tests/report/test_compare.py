# SPDX-License-Identifier: Apache-2.0
"""The page and the table of an experiment: what they say, and that the page fetches nothing."""

import copy
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest
from rich.console import Console

from manyheads.experiment import Arm, Results, Row
from manyheads.experiment.estimates import Estimate
from manyheads.report.compare import caveats, headlines, print_summary, table
from manyheads.report.compare import page as page_of
from manyheads.report.compare_plots import crossover, pictures
from manyheads.report.page import render as html
from manyheads.report.summary import Summary
from tiny import compare as tiny
from tolerance import nearly

texts, tokenizer, model, folder, results = (
    tiny.texts, tiny.tokenizer, tiny.model, tiny.folder, tiny.results
)  # fmt: skip


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def page(results):
    return html(page_of(Summary(results)))


def changed(results, change):
    return Summary(replace(results, rows=[change(row) for row in results.rows]))


def made(values, equal="slots", budget=0.25, task="niah_multikey", metric="multikey"):
    """A run of plain numbers: values by arm, one for each context."""
    arms = [Arm(a, budget=None if a == "full" else budget) for a in values]
    rows = [
        Row(task=task, metric=metric, arm=arm.key, value=value, sample=str(i))
        for arm in arms
        for i, value in enumerate(values[arm.name])
    ]
    arms = [arm.described() for arm in arms]
    experiment = {"arms": arms, "tasks": {task: {"task": task}}, "equal": equal, "seeds": [0], "seed": 0,
                  "device": "cpu"}  # fmt: skip
    model = {"name": "m", "kind": "causal_lm"}
    run = {"experiment": experiment, "units": [], "skipped": {}, "model": model, "texts": None}
    return Summary(Results(run, rows, Path("somewhere")))


def test_page_is_small_and_self_contained(page):
    assert len(page) < 1_000_000
    elements = Page(page).elements
    assert not {tag for tag, _ in elements} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in elements:
        for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,"))
        assert not [name for name in attributes if name.startswith("on")]
    assert (
        all(target.strip("'\"").startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
        and "@import" not in page
    )


def test_pictures_are_there_and_named(page):
    svgs = [attributes for tag, attributes in Page(page).elements if tag == "svg"]
    assert len(svgs) >= 4 and all(len(a["aria-label"]) > 80 and a["role"] == "img" for a in svgs)
    assert page.count("<path") > 100


def test_untrusted_names_are_escaped(results):
    bad = '<script>alert("x")</script>'
    run = copy.deepcopy(results.run)
    run["model"]["name"], run["command"] = bad, ["manyheads", bad]
    run["skipped"] = {"perplexity": bad}
    run["environment"]["cpu"] = bad
    rows = [replace(row, arm=row.arm.replace("random", bad)) for row in results.rows]
    for arm in run["experiment"]["arms"]:
        arm["key"], arm["name"] = arm["key"].replace("random", bad), arm["name"].replace("random", bad)
    text = html(page_of(Summary(replace(results, run=run, rows=rows))))
    assert "<script" not in text.lower() and text.count("&lt;script&gt;") >= 6


def test_numbers_of_a_summary(results):
    summary = Summary(results)
    found = {one.key: one for one in summary.measured}
    assert next(iter(found)) == "perplexity.token_nll" and "speed.decode" in found and "memory.cache" in found
    arms = {arm.key: arm for arm in summary.arms}
    loss, cache = found["perplexity.token_nll"], found["memory.cache"]
    half = arms["random:budget=0.5"]
    value, base = (summary.estimate(loss, arm).value for arm in (half, summary.base))
    assert summary.delta(loss, half).value == nearly(value - base) and summary.delta(loss, summary.base) is None
    assert summary.estimate(loss, half).n == 8 and summary.estimate(loss, half).groups == 4
    assert summary.delta(cache, half).value == pytest.approx(0.5, rel=0.05)  # a ratio
    assert summary.held(half) / summary.held(summary.base) == pytest.approx(0.5, rel=0.05)
    part = summary.estimate(loss, half, {"length": 640})
    assert part.n == 4 and part.value != value
    document = summary.document()
    figure = next(arm for arm in document["arms"] if arm["arm"] == half.key)["figures"]["perplexity.token_nll"]
    assert figure["estimate"]["interval"] == "bootstrap over contexts" and figure["difference"]["low"] is not None


def test_the_best_of_a_budget_and_those_not_told_apart():
    always, never, mostly = [1.0] * 24, [0.0] * 24, [1.0] * 23 + [0.0]
    summary = made({"full": always, "good": always, "near": mostly, "bad": never})
    (one,) = summary.measured
    assert [arm.name for arm in summary.best(one, summary.arms[1:])] == ["good", "near"]
    assert summary.best(one, summary.arms[1:3]) == []  # not told apart: no ranking
    assert "good and near are best" in headlines(summary)[0] and "bad" not in headlines(summary)[0]
    green = [row[0].text for row in table(summary).rows if row[-1].best]
    assert green == ["good", "near"]


def test_next_to_nothing_is_not_praised():
    """One right of 15 is no best, and an arm with none right is not as good as the best, however wide the interval."""
    always, one_right, never = [1.0] * 15, [1.0] + [0.0] * 14, [0.0] * 15
    summary = made({"full": always, "one": one_right, "none": never, "neither": never})
    (one,) = summary.measured
    assert one.metric.floor and summary.best(one, summary.arms[1:]) == []
    assert "no strategy exceeds 50 % (one comes closest, 7 %" in headlines(summary)[0]
    assert "no strategy exceeds 50 %." in headlines(made({"full": always, "a": never, "b": never}))[0]
    some = made({"full": [1.0] * 6, "good": [1.0] * 4 + [0.0] * 2, "none": [0.0] * 6, "bad": [0.0] * 6})
    apart = [some.delta(some.measured[0], arm, than=some.arms[1]).excludes_zero for arm in some.arms[2:]]
    good = made({"full": [1.0] * 24, "good": [1.0] * 24, "near": [1.0] * 22 + [0.0] * 2, "bad": [0.0] * 24})
    assert [arm.name for arm in good.best(good.measured[0], good.arms[1:])] == ["good", "near"]  # the control
    assert apart == [True, True] or "none" not in [arm.name for arm in some.best(some.measured[0], some.arms[1:])]


def test_that_the_baseline_fails_is_the_first_thing_said(capsys):
    from rich.console import Console

    weak = made({"full": [0.0] * 15, "a": [1.0] * 15})
    print_summary(weak, Console(width=160))
    shown = capsys.readouterr().out
    assert shown.startswith("warning: ") and shown.index("not discriminative") < shown.index("strategy")
    assert "not discriminative" in headlines(weak)[0]


def test_what_is_not_discriminative_is_said_and_not_ranked():
    weak = [1.0] * 12 + [0.0] * 12
    summary = made({"full": weak, "good": [1.0] * 24, "bad": [0.0] * 24})
    shown = table(summary)
    assert not [row for row in shown.rows if row[-1].best or "*" in row[-1].text]
    assert "not discriminative" in shown.columns[-1].unit and "itself" not in shown.columns[-1].note
    (said,) = headlines(summary)
    assert "full itself reaches 50 % (31 to 69); only where it is surely above 50 %" in said and "best" not in said
    assert "*" in table(made({"full": [1.0] * 24, "bad": [0.0] * 24})).rows[1][-1].text  # control


def test_who_knows_none_of_it_is_told_what_is_compared():
    from manyheads.report.compare import explained

    of_texts = explained(made({"full": [1.0] * 4, "a": [1.0] * 4}, budget=0.5))
    assert of_texts[0].startswith("All others are compared with full, the model as it is") and of_texts[1].startswith(
        "Budget: how much"
    )
    assert of_texts[2].startswith("One of several: several facts are planted")
    of_images = explained(made({"full": [1.0] * 4, "pab": [1.0] * 4}, "none", None, "fidelity", "psnr"))
    assert of_images[0] == "All others are compared with full on the same samples." and len(of_images) == 1
    from manyheads.comparison import TASKS
    from manyheads.tasks import load

    assert all(metric.what for name in TASKS["causal_lm"] for metric in load(name).metrics)


def test_the_head_names_what_is_equal_and_the_interval_is_said_in_words():
    summary = made({"full": [1.0] * 24, "good": [1.0] * 24}, equal="bytes", budget=4096)
    assert [(c.name, c.unit) for c in table(summary).columns[:2]] == [("strategy", ""), ("budget", "equal bytes")]
    assert table(summary).cells[1][1].text == "4096"
    out = io.StringIO()
    summary.results.run["model"]["name"] = "[b]m"
    print_summary(summary, Console(file=out, width=200))
    said = out.getvalue()
    assert "Wilson, by contexts: one of several (n = 24)" in said
    assert "Newcombe, paired: difference of one of several" in said


def test_other_tasks_need_no_adapter_of_their_own():
    summary = made({"full": [100.0] * 3, "pab": [31.0, 33.0, 35.0]}, "none", None, "fidelity", "psnr")
    (one,) = summary.measured
    assert one.name == "PSNR to the plain image" and one.fixed
    columns, rows = table(summary).columns, table(summary).rows
    assert [c.name for c in columns] == ["strategy", one.name] and columns[1].unit == "dB"
    assert rows[1][1].text == "33*" and " to " in rows[1][1].small  # its own interval: the baseline does not vary
    assert headlines(summary)[0].startswith("PSNR to the plain image (higher is better, full 100): pab 33 (")


def test_caveats_follow_the_data(results):
    said = " ".join(caveats(Summary(results)))
    assert "--samples" in said and "not finished" not in said and "9 arms" in said
    about = {"overlaps": True}
    said = " ".join(caveats(changed(results, lambda row: replace(row, about=about))))
    assert "too narrow" in said


def test_an_unfinished_run_says_so_and_is_drawn(results, tmp_path):
    import shutil

    shutil.copytree(results.folder, tmp_path / "cut")
    for unit in sorted((tmp_path / "cut" / "units").glob("perplexity*"))[:1]:
        unit.unlink()
    cut = Summary(Results.read(tmp_path / "cut"))
    assert "not finished" in " ".join(caveats(cut)) and "</html>" in html(page_of(cut))
    assert not cut.document()["finished"]


def test_partial_runs_are_drawn(results):
    for task in results.run["experiment"]["tasks"]:
        rows = [row for row in results.rows if row.task == task]
        assert "</html>" in html(page_of(Summary(replace(results, rows=rows))))


def test_drawing_twice_gives_the_same_page_and_leaves_matplotlib_alone(results, page):
    before = dict(matplotlib.rcParams)
    assert html(page_of(Summary(results))) == page
    assert dict(matplotlib.rcParams) == before


def test_crossover():
    def times(*values):
        return {n: Estimate(v, v, v, 1, 1, "") for n, v in zip((1024, 4096, 16384), values, strict=True)}

    base = times(1.0, 2.0, 8.0)
    assert crossover(times(2.0, 2.0, 2.0), base) == nearly(4096)
    assert crossover(times(2.0, 4.0, 4.0), base) == nearly(8192)
    assert crossover(times(0.5, 0.5, 0.5), base) == 1024 and crossover(times(0.5, 0.5, 9.0), base) is None
    assert crossover({n: replace(e, low=0.0, high=99.0) for n, e in times(2.0, 2.0, 2.0).items()}, base) is None


def test_times_at_several_lengths_are_lines_and_say_where_they_cross():
    def shown(base):
        values = {"full": base, "mine": [2.0] * 12}
        summary = made(values, "none", None, "mixer_cost", "decode")
        at = [1024, 4096, 16384]
        rows = [replace(row, at={"length": at[i % 12 // 4]}) for i, row in enumerate(summary.results.rows)]
        return {section.title: section for section in pictures(Summary(replace(summary.results, rows=rows)))}

    crossing = shown([1.0] * 4 + [2.0] * 4 + [8.0] * 4)["token by length"].parts[0]
    assert "mine from length 4,096 on" in crossing.caption and "full" in crossing.svg
    assert "none at the largest" in shown([1.0] * 12)["token by length"].parts[0].caption  # control
