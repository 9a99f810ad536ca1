# SPDX-License-Identifier: Apache-2.0
"""Rankers trained and compared on a collection of the user's, from the command line to a model that ranks."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from manyheads import UserError, compare_rankers
from manyheads.cli import app
from manyheads.comparison_rank import plan_ranking
from manyheads.models.ranker import RankingModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve subjects of three documents and two queries."""
    place, rng = tmp_path_factory.mktemp("mine") / "subjects", np.random.default_rng(0)
    place.mkdir()
    documents, queries, qrels = [], [], ["query-id\tcorpus-id\tscore"]
    for subject in range(12):
        own = [f"s{subject}x{i}" for i in range(5)]
        for i in range(3):
            text = " ".join([*rng.choice(own, 6), *(f"common{j}" for j in rng.integers(0, 9, 6))])
            documents.append({"_id": f"{subject}-{i}", "text": text})
        for i in range(2):
            queries.append({"_id": f"q{subject}-{i}", "text": " ".join(rng.choice(own, 2))})
            qrels += [f"q{subject}-{i}\t{subject}-{j}\t1" for j in range(3)]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "qrels.tsv").write_text("\n".join(qrels) + "\n")
    return place


def test_a_folder_is_ranked_from_the_command_line(folder, tmp_path):
    out = tmp_path / "run"
    line = ["compare", "--train", "--ranking", str(folder), "--strategies", "tkl_local", "--quick", "--seeds", "1"]
    result = CliRunner().invoke(app, [*line, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    run = json.loads((out / "run.json").read_text())
    assert [arm["key"] for arm in run["experiment"]["arms"]] == ["bm25", "tkl_local", "random"]
    assert run["options"]["ranking"] == str(folder) and (out / "report.html").is_file()
    model = RankingModel.load(out / "models" / "tkl_local" / "ranking-0")
    assert model.strategy.slug == "tkl_local" and len(model.rank("s1x1 s1x2", ["s1x1 common1", "common2"])) == 2


def test_from_python_bm25_beats_chance(folder, tmp_path):
    results = compare_rankers(folder, ["tkl_local"], seeds=1, quick=True, out=tmp_path, steps=2, folds=4)
    mean = {
        arm: np.mean([row.value for row in results.rows if row.arm == arm and row.metric == "ndcg"])
        for arm in ("bm25", "random")
    }
    assert mean["bm25"] > mean["random"] + 0.3
    assert not [row for row in results.rows if row.metric == "ndcg_by_depth"]  # documents as they are


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranking", "cranfield"], "--ranking goes with --train"),
        (["--train", "--ranking", "cranfield", "--budget", "2M"], "--budget does not go with --ranking"),
        (["--train", "--ranking", "nowhere"], "no collection nowhere"),
        (["--train", "--ranking", "cranfield", "--strategies", "softmax"], "softmax ranks no documents"),
        (["--train", "--strategies", "tkl_local"], "--ranking COLLECTION"),
    ],
)
def test_errors_are_a_line(options, message):
    result = CliRunner().invoke(app, ["compare", *options])
    said = result.output + (str(result.exception) if isinstance(result.exception, UserError) else "")
    assert result.exit_code and message in " ".join(said.split())


def test_arms_of_a_plan():
    plan = plan_ranking("cranfield", model="all-minilm-l6-v2")
    assert [arm.name for arm in plan.arms] == ["bm25", "tkl_local", "tkl_local:chunk=0", "all-minilm-l6-v2", "random"]
