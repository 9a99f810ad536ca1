# SPDX-License-Identifier: Apache-2.0
"""Green lists against a hash in whole numbers, their reader, its test, and the task that compares watermarks."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

import manyheads
from manyheads import UserError, parse
from manyheads.cli import main
from manyheads.decoding.green_list import GreenList, votes
from manyheads.decoding.xattn_watermark.losses import distortion
from manyheads.recipes.xattn_watermark import written
from manyheads.tasks.text.hidden_message import _Marked, _strength
from manyheads.writing import binomial_tail
from tiny import chat
from tiny.compare import tiny
from tolerance import CLOSE, assert_close, nearly

MASK = 2**64 - 1


def mixed(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_the_hash_is_splitmix64():
    context, tokens = torch.tensor([[5], [9]]), torch.tensor([17, 3])
    said, one = votes(context, tokens, 6, key=11)
    for i in range(2):
        x = mixed(mixed(mixed(11) ^ int(context[i, 0])) ^ int(tokens[i]))
        assert (int(said[i]), bool(one[i])) == ((x >> 33) % 6, bool(x & 1))
    assert mixed(0) == 0xE220A8397B1DCDAF  # the first number of SplitMix64 from a seed of 0


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def texts(model):
    """Written with a strong list, a message for each."""
    messages = torch.randint(0, 2, (12, 4), generator=torch.Generator().manual_seed(1)).float()
    ids = torch.randint(1, 1500, (12, 4), generator=torch.Generator().manual_seed(2))
    said = ["".join(str(int(x)) for x in row) for row in messages]
    found = {}
    for window in (0, 1):
        how = GreenList(message="0000", rows=messages, delta=4, window=window, key=3)
        found[window] = written(model, None, ids, 60, seed=5, chooser=how).tolist()
    return said, found


def right(texts, said, **how):
    read = GreenList(message="0000", **how).read(texts, said)
    return float(np.mean([each.right(m) for each, m in zip(read, said, strict=True)])), read


def test_half_of_the_vocabulary_gains_delta():
    how = GreenList(message="0110", delta=1.5, key=7)
    ids, logits = torch.tensor([[4, 8], [2, 9]]), torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    green = how.green(ids, 5000)
    assert abs(green.double().mean() - 0.5) < 0.02 and not torch.equal(green[0], green[1])
    assert_close(how.raised(logits, ids) - logits, 1.5 * green.float(), 20 * CLOSE)
    alone = GreenList(message="0110", window=0, key=7).green(ids, 5000)
    assert torch.equal(alone[0], alone[1])
    rows = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]])
    own = GreenList(message="0000", key=7, rows=rows).green(ids, 5000)
    assert torch.equal(own[0], green[0]) and torch.equal(own[1], GreenList(message="1111", key=7).green(ids, 5000)[1])
    assert not GreenList(message="1", window=3).green(ids, 9).any()


def test_reads_its_message_and_none_with_another_key(texts):
    said, found = texts
    for window in (0, 1):
        share, read = right(found[window], said, window=window, key=3)
        assert share > 0.95 and all(each.p_value < 1e-3 for each in read)
        other, others = right(found[window], said, window=window, key=4)
        assert 0.2 < other < 0.8 and sum(each.p_value < 0.01 for each in others) <= 1


def test_one_list_survives_another_order_and_lists_by_context_do_not(texts):
    said, found = texts
    for window, text in found.items():
        moved = [row[::-1] for row in text]
        share, _ = right(moved, said, window=window, key=3)
        assert share > 0.95 if window == 0 else share < 0.8


def test_a_pair_counts_once_and_the_test_is_binomial(texts):
    said, found = texts
    how = GreenList(message=said[0], window=1, key=3)
    text = found[1][0]
    once, twice = how.read([text, text + text[-1:] + text])
    assert once.tokens == 60 and twice.tokens == 121
    pairs = set(pairwise(text))
    green = [bool(how.green(torch.tensor([[a]]), 1500)[0, b]) for a, b in pairs]
    assert once.p_value == nearly(binomial_tail(sum(green), len(green)))
    assert once.p_value / 8 < twice.p_value < 0.01  # two new pairs: counted again, the others would square it
    assert how.read([[5]])[0].p_value == 1 and how.read([[]])[0].right("0110") == 0.5


def test_a_line_writes_and_a_line_reads(model):
    reader = chat.tokenizer()
    spec = "green_list:message=1011,delta=6,key=5"
    how = {"max_new_tokens": 40, "seed": 1}
    assert manyheads.reply(model, reader, "Who was it", spec, **how) != manyheads.reply(
        model, reader, "Who was it", "sampling", **how
    )
    ids, given = torch.tensor([[5, 7]]), [parse(spec), parse("sampling")]
    text, plain = (" ".join(map(str, written(model, None, ids, 40, chooser=c)[0].tolist())) for c in given)
    reader.encode = lambda text, **_: [int(word) for word in text.split()]
    found = manyheads.detect(text, spec, reader)
    assert found.p_value < 0.01 < manyheads.detect(plain, spec, reader).p_value
    assert len(found.bits) == 4 and found.right("1011") >= 0.75
    with pytest.raises(UserError, match="hides no message"):
        manyheads.detect(text, "sampling", reader)
    with pytest.raises(UserError, match="no text"):
        manyheads.detect("", spec, reader)


@pytest.mark.parametrize("spec", ["message=", "message=2", "delta=-1", "window=-1", "temperature=0"])
def test_wrong_settings_are_refused(spec):
    with pytest.raises(UserError):
        parse(f"green_list:{spec}")


@torch.no_grad()
def test_the_task_sets_a_strength_that_costs_its_budget(model):
    ids = torch.randint(1, 1500, (4, 20), generator=torch.Generator().manual_seed(3))
    plain = model(ids[:, :-1], use_cache=False).logits
    rows = torch.randint(0, 2, (4, 8), generator=torch.Generator().manual_seed(4))

    def cost(delta):
        how = _Marked(None, GreenList(message="0" * 8, delta=delta, rows=rows), delta)
        found = how.logits(model, ids, plain)
        step = how.chooser.raised(plain[:, 7], ids[:, :8])
        assert torch.equal(found[:, 7], step)  # as in writing
        return float(distortion(found, plain).mean())

    for budget in (0.05, 0.4):
        assert cost(_strength(cost, budget)) == pytest.approx(budget, rel=0.05)
    assert _strength(lambda _: 0.0, 0.1) >= 15  # nothing is enough: the largest


def test_the_verb_reads_a_file_and_says_what_is_wrong(capsys, tmp_path):
    def typed(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["detect", *map(str, arguments)])
        return stop.value.code, *capsys.readouterr()

    file = tmp_path / "text.txt"
    file.write_text("def area(width, height):\n    return width * height\n")
    code, out, _ = typed(file, "--strategy", "green_list:message=1011", "--json")
    found = json.loads(out)
    assert code == 0 and len(found["bits"]) == 4 and 0 < found["p_value"] <= 1 and found["tokens"] > 5
    code, out, _ = typed(file, "--strategy", "green_list:message=1011")
    assert code == 0 and found["bits"] in out
    code, _, err = typed(tmp_path / "none.txt", "--strategy", "green_list")
    assert code != 0 and "cannot be read" in err
