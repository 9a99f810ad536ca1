# SPDX-License-Identifier: Apache-2.0
"""The recipe of ``reasoning_rhythm``: each credit scales the tokens that it names, sums are right, it runs."""

import json

import numpy as np
import pytest
import torch

import manyheads
from manyheads.data.word_problems import last_number, worked_sum
from manyheads.errors import UserError
from manyheads.experiment import Arm, CausalLM
from manyheads.lenses.reasoning_rhythm import credit, peaks
from manyheads.recipes import reasoning_rhythm as recipe
from manyheads.tasks.lenses.rewarded_sums import RewardedSums
from manyheads.training.policy_gradient import Rollout, sample
from oracles import models
from oracles.tasks import context, rows, values
from tolerance import FORMULA, SAME, assert_close, is_far, nearly

LENS = "reasoning_rhythm:nearest=3,farthest=9,window=4"


def by_hand(waad, fai, by):
    """gamma of lists, for coupled credit anchor by anchor; 40 % of the tokens, two thirds of them by quantile."""
    n = len(waad)
    change = [abs(waad[t] - waad[t + 1]) for t in range(n - 1)]

    def top(score):
        known = [t for t, x in enumerate(score) if x is not None]
        return sorted(known, key=lambda t: (-score[t], t))[: round(0.4 * len(known))]

    gamma = [1.0] * n
    if by == "local":
        for t in top(change):
            gamma[t] = 1.5
        return gamma
    for t in top(fai):
        gamma[t] = 1.5
    if by == "coupled":
        low, high = float(np.quantile(waad, 0.4)), float(np.quantile(change, 0.6))
        introduced = set()
        for t in top(fai):
            near = list(range(max(0, t - 3), t))[::-1]
            best = max(near, key=lambda u: change[u], default=None)
            if best is not None and waad[t] <= low and change[best] >= high:
                gamma[t] -= 0.25
                introduced.add(best)
        for u in introduced:
            gamma[u] += 0.25
    return gamma


@pytest.mark.parametrize("by", ["local", "global", "coupled"])
def test_credit_by_hand(by):
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(20):
        waad, fai = rng.random(12), rng.random(12)
        fai[-3:] = np.nan
        given = torch.from_numpy(waad)[None], torch.from_numpy(fai)[None], torch.ones(1, 12, dtype=torch.bool)
        wanted = by_hand(waad.tolist(), [None if np.isnan(x) else x for x in fai.tolist()], by)
        assert credit(*given, by)[0].tolist() == nearly(wanted)
        others = {other for other in ("local", "global", "coupled") if other != by}
        assert any(credit(*given, other)[0].tolist() != nearly(wanted) for other in others)
        seen |= set(wanted)
    assert seen == ({1, 1.25, 1.5, 1.75} if by == "coupled" else {1, 1.5})


@pytest.fixture(scope="module")
def rollout():
    """Two groups of responses of a tiny model, with an advantage of its own for every row."""
    model, generator = models.tiny("llama"), torch.Generator().manual_seed(0)
    ids, start = models.tokens(4, 40), 9
    mask = torch.ones(4, 40, dtype=torch.long)
    mask[:2, :3], mask[1, 33:], mask[3, 30:] = 0, 0, 0
    response = (torch.arange(40) >= start) & (mask > 0)
    old = torch.randn(4, 40, generator=generator)
    advantages = torch.tensor([[1.0], [2.0], [-1.0], [0.5]]) * response
    return model, Rollout(ids, mask, response, start, torch.zeros(4), advantages, old)


def looked(model, made):
    """WAAD and FAI of each response, of one row after the other, with the sets of heads of all."""
    spans = [[(made.start, made.start + int(n))] for n in made.response.sum(1)]
    with manyheads.watch(model, LENS, roles=manyheads.TokenSpans({"response": spans})) as seen, torch.no_grad():
        model(**made.inputs())
    return {name: torch.from_numpy(np.stack(seen.compute().series[name])) for name in ("waad", "fai")}


@pytest.mark.parametrize("way", ["local", "global", "coupled"])
def test_advantages_are_scaled_as_the_lens_says(rollout, way):
    model, made = rollout
    found, seen = recipe.rhythm_credit(way, LENS)(model, made), looked(model, made)
    for n in range(4):
        row = made.response[n]
        waad, fai = (seen[name][n, row].tolist() for name in ("waad", "fai"))
        gamma = torch.ones(40)
        gamma[row] = torch.tensor(by_hand(waad, [None if np.isnan(x) else x for x in fai], way))
        assert_close(found[n], made.advantages[n] * (gamma if n != 2 else 1), FORMULA)  # blame is shared as ever
        assert is_far(found[n], made.advantages[n], SAME) == (n != 2)


def test_controls_amplify_as_many_tokens(rollout):
    """As many as there are anchors, in the same places to choose from; random ones differ from rollout to rollout."""
    model, made = rollout
    anchors = recipe.rhythm_credit("global", LENS)(model, made) > made.advantages
    seen, found = looked(model, made), {}
    for way in ("random", "entropy"):
        found[way] = recipe.rhythm_credit(way, LENS)(model, made)
        marked = found[way] > made.advantages
        assert torch.equal(marked.sum(1), anchors.sum(1)) and marked[[0, 1, 3]].any(1).all()
        assert not (marked & ~(seen["fai"].isfinite() & made.response)).any() and not torch.equal(marked, anchors)
        assert_close(found[way], made.advantages * (1 + 0.5 * marked), FORMULA)
    with torch.no_grad():
        logits = model(**made.inputs()).logits.double()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    known = seen["fai"].isfinite() & made.response
    before, itself = (
        peaks(score.masked_fill(~known, torch.nan), 0.4) for score in (entropy.roll(1, 1), entropy)
    )  # of the distribution that a token was drawn from
    marked = found["entropy"] > made.advantages
    assert torch.equal(marked, before & (made.advantages > 0)) and not torch.equal(marked, itself)
    again, other, later = (recipe.rhythm_credit("random", LENS, seed) for seed in (0, 1, 0))
    assert torch.equal(again(model, made), found["random"]) and not torch.equal(other(model, made), found["random"])
    made.number = 7
    assert not torch.equal(later(model, made), found["random"])
    made.number = 0
    assert recipe.rhythm_credit("uniform") is None
    with pytest.raises(UserError, match="read from reasoning_rhythm"):
        recipe.rhythm_credit("random", "massive_values")


def test_sums():
    assert worked_sum([47, 85, -36]) == (
        "What is 47 + 85 - 36?", "47 + 85 = 132. 132 - 36 = 96. The answer is 96."
    )  # fmt: skip
    for problem in recipe.drawn_sums(50, np.random.default_rng(0), largest=20):
        asked = problem.question.removeprefix("What is ").removesuffix("?").replace("- ", "-").replace("+ ", "")
        assert sum(map(int, asked.split())) == problem.result == last_number(problem.answer) >= 0
        for step in problem.answer.split(". ")[:-1]:
            left, right = step.split(" = ")
            assert sum(map(int, left.replace("- ", "-").replace("+ ", "").split())) == int(right)
    assert [last_number(x) for x in ("1,200 of it.", "a -3", "so 4 = 5.", "2.5", "none", "x7 is 8x")] == [
        1200, -3, 5, None, None, None
    ]  # fmt: skip


def test_what_is_worth_something():
    words = Digits()
    (prompt,) = recipe.prompts_of(words, [recipe.Problem("What is 1 + 1?", "", 2)])
    assert "1 + 1?\n" in words.decode(prompt.ids) and words.decode(prompt.ids).endswith(":")
    assert [prompt.reward(words.encode(x)) for x in (" 1 + 1 = 2.", " 2 = 3.", "", " 3. The answer is 2.")] == [
        1,
        0,
        0,
        1,
    ]


def test_problems_of_a_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"question": "How many?", "answer": "Seven, 7."}\n\n')
    assert recipe.problems_in(path) == [recipe.Problem("How many?", "Seven, 7.", 7)]
    for wrong in (
        "",
        "[1]",
        '{"question": "q"}',
        '{"question": "q", "answer": "none"}',
        '{"question": "q", "answer": 3}',
    ):
        path.write_text(wrong)
        with pytest.raises(UserError, match=r"problems\.jsonl has"):
            recipe.problems_in(path)


class Digits:
    """A tokenizer of one sign a token, for a tiny model."""

    chat_template, bos_token, pad_token_id = None, "", 0
    signs = "\0\1\2 0123456789+-=.?ThewranWiswxuts:\n"

    def encode(self, text, **_):
        return [self.signs.index(sign) for sign in text if sign in self.signs]

    def decode(self, ids, **_):
        return "".join(self.signs[i] if i < len(self.signs) else "~" for i in ids)

    def save_pretrained(self, folder):
        """Nothing to keep."""


@pytest.fixture
def tiny(monkeypatch):
    model = models.build("llama").requires_grad_(True)
    model.generation_config.eos_token_id = 2
    subject = CausalLM("tiny", model, Digits())
    monkeypatch.setattr(recipe, "CausalLM", lambda name: subject)
    return subject


def test_imitation_ends_when_enough_is_right(tiny):
    same = recipe.drawn_sums(1, np.random.default_rng(0), terms=2, largest=3)
    before = recipe.right(tiny.model, recipe.prompts_of(Digits(), same), 40, draws=8)
    steps, share = recipe.warm_up(tiny.model, Digits(), lambda number: same * 4, same, until=0.7, lr=1e-2, length=40)
    assert 0 < steps < 200 and steps % 10 == 0 and share >= 0.7 > float(before.mean())
    assert recipe.warm_up(tiny.model, Digits(), lambda number: same, same, until=0.5, lr=1e-2, length=40)[0] == 0


def test_from_end_to_end(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "model"
    options = [
        "--out", str(out), "--budget", "4 steps", "--prompts", "2", "--group", "2", "--tokens", "20", "--device", "cpu",
    ]  # fmt: skip
    assert recipe.main([*options, "--lens", "massive_values"]) == 1 and "read from" in capsys.readouterr().err
    assert recipe.main(options) == 0, capsys.readouterr().err
    settings = json.loads((out / "rewards.json").read_text())
    assert [row["rollout"] for row in settings["curve"]] == [0, 1] and settings["settings"]["credit"] == "coupled"
    assert (out / "model.safetensors").is_file() and not (out / "training").exists()
    with pytest.raises(SystemExit):
        recipe.main(options)
    assert "name a new folder" in capsys.readouterr().err


def test_the_task(tiny):
    """The baseline is the imitation; each arm is trained from it, on as many responses, and judged on the same sums."""
    arms = Arm("before RL"), Arm("uniform", options={"credit": "uniform"}), Arm("random", options={"credit": "random"})
    task = RewardedSums(
        steps=4, prompts=2, group=2, tokens=24, problems=5, answers=2, warm=1.0, warm_steps=5, lr=1e-2, largest=9
    )  # fmt: skip
    run = context(*arms, subject=tiny, seeds=(0, 1))
    weights = {name: x.clone() for name, x in tiny.model.state_dict().items()}
    found = rows(task, run)
    assert all(torch.equal(x, weights[name]) for name, x in tiny.model.state_dict().items())
    for arm in arms:
        solved = [row for row in found if row.metric == "solved" and row.arm == arm.key]
        assert [(row.seed, row.sample) for row in solved] == [(s, f"{i}") for s in (0, 1) for i in range(5)]
    rewards = [row for row in found if row.metric == "reward"]
    assert {row.arm for row in rewards} == {"uniform", "random"} and len(rewards) == 2 * 2 * 2
    assert {row.at["part"] for row in rewards} == {1, 3} and set(values(found, "reward")) <= {0, 0.25, 0.5, 0.75, 1}
    test = {problem.question for problem in task._drawn(run, "test", 5)}
    assert len(test) == 5 and test == {problem.question for problem in task._drawn(run, "test", 5)}
    assert task.unsupported_reason(context(*arms, subject=CausalLM("recall")))


def test_processes_share_one_imitation(tiny, tmp_path, monkeypatch):
    task = RewardedSums(warm_steps=5, warm=1.0, tokens=8, largest=9)
    run = context(subject=tiny)
    run.folder = tmp_path
    first = task._warm(run)
    monkeypatch.setattr(RewardedSums, "_imitated", lambda self, run: pytest.fail("made twice"))
    assert all(torch.equal(x, first[name]) for name, x in task._warm(run).items())
    assert any(is_far(x, tiny.model.state_dict()[name], SAME) for name, x in first.items() if x.ndim == 2)


def test_responses_are_looked_at_as_they_were_drawn():
    """What generate gives goes into the credit as it is: rows of unequal ends, in their order."""
    model = models.build("llama")
    model.generation_config.eos_token_id = 3
    prompts = [recipe.Prompt([2, 7, 9], lambda ids: float(len(ids))), recipe.Prompt([5], lambda ids: float(len(ids)))]
    made = sample(model, prompts, 4, 30, seed=1)
    made.advantages = made.response.float()
    found = recipe.rhythm_credit("coupled", LENS)(model, made)
    assert (found[~made.response] == 0).all() and (found[made.response] >= 1).all() and (found > 1).any()
