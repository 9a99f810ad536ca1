# SPDX-License-Identifier: Apache-2.0
"""DietCode: statements are those of Python, the knapsack is the best set, and what is left is as long as it may be."""

import ast
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import manyheads
from manyheads import UserError
from manyheads.text_reducing import TextWeights
from manyheads.tokens._programs import read_program
from manyheads.tokens.dietcode import DietCode, knapsack
from tiny.tokenizers import BOTH

PROGRAM = '''
    @cached
    async def fetchAll(self, user_name, *, limit=10):
        """Says what it does."""
        # a comment
        rows: list = []
        for i, row in enumerate(self.table):
            if row.name == user_name and not row.hidden:
                rows.append(f"{row.id}:{i}")
            elif limit:
                continue
            else:
                rows += [None]
        while limit:
            limit -= 1
        try:
            await self.close(rows)
        except (OSError, ValueError) as error:
            raise RuntimeError("gone") from error
        finally:
            log("done")
        with open("x") as f, open("y"):
            pass
        match limit:
            case 0:
                del rows
            case _:
                assert rows
        return "".join(rows)
'''
KINDS = (
    "annotation method expression variable for if function if continue if expression while expression try function "
    "except raise finally function with pass match match delete match assert return"
).split()  # fmt: skip
WEIGHTS = TextWeights({"return": 4.0, "method": 3.0, "for": 0.5}, {"rows": 2.0, "(": 0.1, ")": 0.2, "self": 0.3})


def count(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", BOTH)
def test_a_program_is_its_statements(name):
    tokenizer = BOTH[name]()
    program = read_program(PROGRAM, tokenizer)
    assert list(program.kinds) == KINDS
    heads = [line.strip() for line in ast.unparse(ast.parse("if 1:" + PROGRAM)).split("\n") if line.strip()][1:]
    assert program.text.split("\n") == heads  # nothing but comments and indentation is lost
    assert sum(program.sizes()) == sum(p.size for p in program.pieces) == count(tokenizer, program.text)
    of = ["".join(p.text for p in program.pieces if p.statement == i).strip() for i in range(len(KINDS))]
    assert of == heads
    called = "".join(p.text for p in program.pieces if p.called)
    assert "enumerate(self.table)" in called and "hidden" not in called and "rows.append" in called


@pytest.mark.parametrize("name", BOTH)
def test_long_strings_belong_to_their_statement(name):
    program = read_program('def f(x):\n    y = f"""a\n{x}\nelse:\n\'\'\' \\" """\n    return y\n', BOTH[name]())
    assert len(program.kinds) == 3 and program.kinds[0] == "method" and program.kinds[-1] == "return"


@pytest.mark.parametrize("name", BOTH)
def test_letters_of_several_bytes_keep_their_places(name):
    program = read_program("def f(ä):\n    é = 'öß' + str(ä)\n    return é\n", BOTH[name]())
    assert "".join(p.text for p in program.pieces if p.called).strip() == "str(ä)"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=9),
    st.integers(0, 30),
)
def test_the_knapsack_is_the_best_set(items, capacity):
    values, sizes = [float(v) for v, _ in items], [n for _, n in items]
    every = (s for k in range(len(items) + 1) for s in itertools.combinations(range(len(items)), k))
    best = max(sum(values[i] for i in s) for s in every if sum(sizes[i] for i in s) <= capacity)
    chosen = knapsack(values, sizes, capacity)
    assert sum(values[i] for i in chosen) == best and sum(sizes[i] for i in chosen) <= capacity
    left, greedy = capacity, 0.0
    for i in sorted(range(len(items)), key=lambda i: -values[i] / sizes[i]):
        if sizes[i] <= left:
            left, greedy = left - sizes[i], greedy + values[i]
    assert greedy <= best


def test_equal_values_and_sizes_keep_as_many_as_fit():
    assert knapsack([1.0] * 7, [3] * 7, 11) == [0, 1, 2]


SPECS = (
    "dietcode", "dietcode:value=tokens", "dietcode:statements=false", "dietcode:choose=random", "dietcode:choose=first",
    "slimcode",
)  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("budget", [0.9, 0.6, 0.25, 7])
def test_as_many_tokens_as_the_budget(spec, name, budget):
    tokenizer = BOTH[name]()
    strategy = manyheads.parse(f"{spec}{',' if ':' in spec else ':'}budget={budget}")
    whole = count(tokenizer, PROGRAM)
    limit = budget if budget == 7 else int(np.ceil(budget * whole))
    made = strategy.shorten(PROGRAM, tokenizer, WEIGHTS)
    bare = count(tokenizer, read_program(PROGRAM, tokenizer).text)  # without comments and indentation
    assert min(bare, limit - 5) <= count(tokenizer, made.text) <= limit  # a word of six tokens may be too much
    assert made == strategy.shorten(PROGRAM, tokenizer, WEIGHTS)
    words = [p.strip() for p, kept in zip(made.pieces, made.kept, strict=True) if kept]
    assert "".join(words).replace(" ", "") == "".join(made.text.split())  # the order of what is kept
    for least in (whole, 1.0):
        again = type(strategy)(budget=least).shorten(PROGRAM, tokenizer, WEIGHTS)
        assert again.text == PROGRAM.strip() and all(again.kept)


def dense(program, limit, weights):
    """Which pieces DietCode keeps, by the formula: all sets of statements, then words one by one."""
    sizes, n = program.sizes(), len(program.kinds)
    values = [weights.statements.get(kind, 1.0) for kind in program.kinds]
    room = limit + max(sizes)
    sets = [s for k in range(n + 1) for s in itertools.combinations(range(n), k) if sum(sizes[i] for i in s) <= room]
    top = max(sum(values[i] for i in s) for s in sets)
    found = []
    for chosen in (s for s in sets if sum(values[i] for i in s) == pytest.approx(top)):
        kept = [i for i, p in enumerate(program.pieces) if p.statement in chosen]
        while sum(program.pieces[i].size for i in kept) > limit:
            kept.remove(min(kept, key=lambda i: (weights.words.get(program.pieces[i].word, 1.0), -i)))
        found.append(kept)
    return found


SHORT = "def f(self, rows):\n    for r in rows:\n        self.add(r)\n    x = (rows)\n    return rows\n"


@pytest.mark.parametrize("budget", [8, 12, 16])
def test_statements_and_words_by_the_formula(budget):
    tokenizer = BOTH["words"]()
    program = read_program(SHORT, tokenizer)
    made = DietCode(budget=budget).shorten(SHORT, tokenizer, WEIGHTS)
    kept = [i for i, one in enumerate(made.kept) if one]
    assert kept in dense(program, budget, WEIGHTS)
    for wrong in (TextWeights({}, {}), TextWeights({"for": 9.0, "function": 9.0}, WEIGHTS.words)):
        assert kept not in dense(program, budget, wrong)


def test_weights_are_means_of_means():
    tokenizer = BOTH["words"]()
    read = [read_program(text, tokenizer) for text in ("x = 1", "x = y\ny = x")]
    found = DietCode().learn(read, [[2.0, 4.0, 6.0], [1.0, 1.0, 1.0, 5.0, 1.0, np.nan]])
    # relative to 4 and 1.8; the last token is not known
    assert found.statements == pytest.approx({"variable": np.mean([1.0, 1 / 1.8, 3 / 1.8])})
    assert found.words["x"] == pytest.approx(np.mean([0.5, 1 / 1.8])) and found.words["1"] == pytest.approx(1.5)
    assert found.words["y"] == pytest.approx(np.mean([1 / 1.8, 5 / 1.8]))


def test_weights_are_kept_in_a_file(tmp_path):
    WEIGHTS.save(tmp_path / "w.json")
    assert TextWeights.load(tmp_path / "w.json") == WEIGHTS
    (tmp_path / "w.json").write_text('{"words": 3}')
    for name in ("w.json", "none.json"):
        with pytest.raises(UserError, match="no weights of words"):
            TextWeights.load(tmp_path / name)


def test_random_choice_looks_at_no_weights():
    tokenizer = BOTH["bytes"]()
    made = [manyheads.parse(f"dietcode:choose=random,seed={seed}").shorten(PROGRAM, tokenizer) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_refused():
    tokenizer = BOTH["words"]()
    with pytest.raises(UserError, match="weighs by attention"):
        manyheads.parse("dietcode").shorten(PROGRAM, tokenizer)
    with pytest.raises(UserError, match="only Python"):
        manyheads.parse("dietcode").shorten("int main() { return 0; }", tokenizer, WEIGHTS)
    with pytest.raises(UserError, match="fast"):
        read_program(PROGRAM, object())
    with pytest.raises(UserError, match="learns nothing"):
        manyheads.parse("slimcode").learn([], [])
