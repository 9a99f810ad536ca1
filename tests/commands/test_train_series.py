# SPDX-License-Identifier: Apache-2.0
"""A paper of the field series as it is typed: trained on a folder of one's own, beside naive forecasts; then used."""

import json

import pytest

from manyheads.cli import main
from tiny.series import stations

__all__ = ["stations"]
TASK = "irregular_forecast:dim=16,layers=1,heads=2,batch=2,rates=0.003,samples_judged=4,encoder=words,days=4"


def test_train_then_predict(stations, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def cli(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 0, capsys.readouterr().err
        return capsys.readouterr().out

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
