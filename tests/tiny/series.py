# SPDX-License-Identifier: Apache-2.0
"""A folder of irregular series of two variables, with texts."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def stations(tmp_path_factory):
    """Three stations, 300 observations each, some missing; a text a day."""
    place = tmp_path_factory.mktemp("stations")
    for number, name in enumerate(("ash", "elm", "oak")):
        rng = np.random.default_rng(number)
        (place / name).mkdir()
        hours = np.sort(rng.choice(1200, 300, replace=False))
        rows = ["date_time,record_id,warm,wet"]
        for hour in hours:
            stamp = np.datetime64("2024-01-01T00:00") + np.timedelta64(int(hour), "h")
            warm, wet = f"{10 + 3 * np.sin(hour / 4):.3f}", f"{rng.normal(5):.3f}" if rng.random() < 0.6 else ""
            rows.append(f"{str(stamp).replace('T', ' ')}:00,{name},{warm},{wet}")
        (place / name / "time_series.csv").write_text("\n".join(rows) + "\n")
        texts = [f"2024-{1 + day // 31:02}-{1 + day % 31:02} 06:30:00,{name},day {day}" for day in range(50)]
        (place / name / "text.csv").write_text("\n".join(["date_time,record_id,text", *texts]) + "\n")
    return place
