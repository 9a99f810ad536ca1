# SPDX-License-Identifier: Apache-2.0
"""Prices of shares: what is said of the public sets is so; a file of one's own, and files that will not do."""

import numpy as np
import pytest

from manyheads.data import files
from manyheads.data.stocks import COLUMNS, FILES, read_prices, read_shares, stock_folder, stocks
from manyheads.errors import UserError
from tolerance import FORMULA, is_close


def read(source):
    if not any(files.local(file) for file in FILES[source]):
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    return stocks(source)


@pytest.mark.parametrize(
    ("source", "shares", "days"), [("year", 12, (251, 253)), ("decade", 10, (3000, 3700)), ("sectors", 88, (290, 1260))]
)
def test_is_what_is_said_of_it(source, shares, days):
    found = read(source)
    assert len(found) == shares == len({one.name for one in found})
    for one in found:
        assert days[0] <= len(one.dates) == len(one.values) <= days[1] and one.values.shape[1] == len(COLUMNS)
        assert (np.diff(one.dates).astype(int) > 0).all() and (one.values[:, :5] > 0).all()
        weekday = (one.dates.astype(int) + 3) % 7
        assert (weekday < 5).all()
        assert len(one.log_returns()) == len(one.dates) - 1 and abs(one.log_returns()).max() < 0.7


def test_a_day_is_that_of_the_file():
    tesla = next(one for one in read("year") if one.name == "TSLA")
    assert str(tesla.dates[0]) == "2018-03-23" and tesla.column("close")[0] == 301.540009
    assert tesla.column("volume")[-1] == 8732600


def test_adjusted_prices_are_those_of_the_file():
    apple = next(one for one in read("sectors") if one.name == "AAPL")
    assert str(apple.dates[0]) == "2012-09-04" and apple.column("close")[0] == 96.424286
    assert apple.column("adjusted")[0] == 87.121140


ROWS = """Date,Open,High,Low,Close,Volume
2024-01-03,2,2,2,4,7
2024-01-02,1,1,1,2,
2024-01-04,,,,,
2024-01-05,1,1,1,1,3
"""


def test_a_file_of_ones_own(tmp_path):
    (tmp_path / "mine.csv").write_text(ROWS)
    (one,) = stock_folder(tmp_path)
    assert one.name == "mine" and one.dates.astype(str).tolist() == ["2024-01-02", "2024-01-03", "2024-01-05"]
    assert one.column("close").tolist() == one.column("adjusted").tolist() == [2, 4, 1]
    assert is_close(one.log_returns(), np.log([2, 0.25]), FORMULA) and one.column("volume").tolist() == [0, 7, 3]
    (tmp_path / "mine.csv").write_text(ROWS.replace(",,,,", ",null,null,null,null,null"))  # as Yahoo Finance writes it
    assert len(read_prices(tmp_path / "mine.csv").dates) == 3
    (tmp_path / "mine.csv").write_text(ROWS.replace("Volume", "Adj Close").replace(",7\n", ",3\n"))
    assert read_prices(tmp_path / "mine.csv").column("adjusted").tolist() == [2, 3, 3]


@pytest.mark.parametrize(
    "text",
    [
        "", "Date,Open\n2024-01-02,1\n", "Close\n1\n2\n", ROWS.replace("2,2,2,4", "2,2,2,x"),
        ROWS.replace("2024-01-03", "3 January"), ROWS.replace("2,2,2,4", "2,2,2,-4"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_refused(tmp_path, text):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match=r"mine\.csv"):
        read_prices(tmp_path / "mine.csv")


def test_several_shares_of_one_file(tmp_path):
    lines = ROWS.splitlines()
    rows = [f"{line},{name}" for name in ("b", "a ") for line in lines[1:]]
    (tmp_path / "all.csv").write_text("\n".join([f"{lines[0]},Symbol", *rows]))
    one, other = read_shares(tmp_path / "all.csv")
    assert (one.name, other.name) == ("a", "b") and one.column("close").tolist() == [2, 4, 1]
    (tmp_path / "all.csv").write_text(ROWS)
    with pytest.raises(UserError, match="names no share in a column ticker"):
        read_shares(tmp_path / "all.csv")
    assert [share.name for share in read_shares(tmp_path)] == ["all"]


def test_an_empty_folder_and_an_unknown_set(tmp_path):
    with pytest.raises(UserError, match="one a share"):
        stock_folder(tmp_path)
    with pytest.raises(UserError, match="there are year, decade, sectors, echo, peaks"):
        stocks("hours")
