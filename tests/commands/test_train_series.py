# SPDX-License-Identifier: Apache-2.0
"""A paper of the field series as it is typed: trained on a folder of one's own, beside naive forecasts; then used."""

import json
from functools import partial

import numpy as np
import pytest

from manyheads.cli import main
from tiny.series import stations

__all__ = ["stations"]
TASK = "irregular_forecast:dim=16,layers=1,heads=2,batch=2,rates=0.003,samples_judged=4,encoder=words,days=4"


def typed(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_train_then_predict(stations, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    cli = partial(typed, capsys)
    options = ("--task", TASK, "--data", str(stations), "--seeds", "1", "--budget", "4", "--out", "run")
    out = cli("train", "imm_tsf,naive_forecast,tabular_forecast:model=ridge", *options)
    assert "squared error" in out and "naive_forecast" in out
    page = (tmp_path / "run" / "report.html").read_text()
    for title in ("Learning curves", "weights of texts", "All figures"):
        assert f">{title}<" in page, title
    assert "forecast, imm_tsf" in page and "observed" in page
    file = str(stations / "oak" / "time_series.csv")
    (said,) = json.loads(cli("predict", "run/models/imm_tsf/seed-0", file, "--json"))
    assert said["said"].startswith("date_time,warm,wet\n2024-02-") and said["said"].count("\n") == 32


def test_shares_of_ones_own(capsys, tmp_path, monkeypatch):
    """A portfolio of shares of a folder; then a file of several shares is ranked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    rng, together = np.random.default_rng(0), ["ticker,date,close,volume"]
    for name in "ABCDEF":
        closes = 20 * np.cumprod(1 + 0.02 * rng.standard_normal(45))
        dates = np.datetime64("2024-01-05") + 7 * np.arange(45)
        rows = [f"{d},{p:.4f},{v:.0f}" for d, p, v in zip(dates, closes, rng.uniform(1e3, 9e3, 45), strict=True)]
        (tmp_path / "mine" / f"{name}.csv").write_text("\n".join(["date,close,volume", *rows]))
        together += [f"{name},{row}" for row in rows]
    (tmp_path / "all.csv").write_text("\n".join(together))
    task = "stock_ranking:dim=16,layers=1,heads=2,rates=0.003"
    options = ("--task", task, "--data", "mine", "--seeds", "1", "--budget", "4", "--out", "run")
    out = typed(capsys, "train", "quantformer,naive_forecast", *options)
    assert "Sharpe ratio" in out and "gain over all shares" in out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "worth of 1, 0.3 %" in page and "attention of the last period" in page
    (said,) = json.loads(typed(capsys, "predict", "run/models/quantformer/seed-0", "all.csv", "--json"))
    assert said["said"].startswith("hold ") and sorted(set(said["said"]) & set("ABCDEF")) == list("ABCDEF")
