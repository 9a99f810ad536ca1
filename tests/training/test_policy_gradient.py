# SPDX-License-Identifier: Apache-2.0
"""Advantages and the clipped loss by hand and by another route; rollouts, their seeds, what is learned, going on."""

import copy
import math
import statistics

import pytest
import torch

from manyheads.errors import UserError
from manyheads.training import Checkpoint
from manyheads.training.policy_gradient import (
    Prompt,
    clipped_loss,
    ends_of,
    group_advantages,
    sample,
    token_log_probs,
    train_policy,
)
from oracles import models
from tolerance import CLOSE, FORMULA, assert_close, is_close, is_far, nearly

END, WANTED = 3, 5
PROMPTS = [Prompt([2, 7, 9], lambda ids: float(WANTED in ids)), Prompt([4, 8], lambda ids: float(WANTED in ids))]


def policy():
    """A tiny model whose texts end."""
    model = models.build("llama").requires_grad_(True)
    model.generation_config.eos_token_id = END
    return model


def train(model=None, **given):
    model = model or policy()
    state = train_policy(model, lambda number: PROMPTS, **{"budget": 4, "lr": 1e-2, "group": 4, "length": 6, **given})
    return torch.cat([p.detach().flatten() for p in model.parameters()]), state, model


def test_advantages_of_groups():
    """The mean of a group is 0 and its deviation 1; a group of one kind teaches nothing."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [1.0] * 5, [0.0, 0.0, 0.0, 0.0, 2.0]], dtype=torch.float64)
    found = group_advantages(rewards)
    for row, got in zip(rewards.tolist(), found.tolist(), strict=True):
        spread = statistics.stdev(row)
        wanted = [(x - statistics.fmean(row)) / (spread + 1e-6) for x in row]
        assert got == nearly(wanted)
    over_all = (rewards - rewards.mean()) / rewards.std()
    assert is_far(over_all[0], found[0]) and over_all[1].abs().max() > 0.1  # control: one mean for all groups
    with pytest.raises(ValueError, match="two responses"):
        group_advantages(rewards[:, :1])


def written_out(new, old, advantages, response, low, high, reference=None, beta=0.0):
    """The loss token by token, in Python's own numbers."""
    losses = []
    for n in range(len(new)):
        total, count = 0.0, 0
        for t in range(new.shape[1]):
            if not response[n, t]:
                continue
            ratio, a = math.exp(float(new[n, t] - old[n, t])), float(advantages[n, t])
            value = min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a)
            if reference is not None:
                r = math.exp(float(reference[n, t] - new[n, t]))
                value -= beta * (r - math.log(r) - 1)
            total, count = total + value, count + 1
        losses.append(-total / count)
    return sum(losses) / len(losses)


def test_the_clipped_loss():
    generator = torch.Generator().manual_seed(0)
    new, old, reference, advantages = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(4))
    response = torch.arange(7) >= torch.tensor([[2], [3], [5]])
    new[~response], old[~response] = torch.nan, 0.0
    for given in ({}, {"reference": reference, "beta": 0.3}):
        found = clipped_loss(new, old, advantages, response, low=0.2, high=0.3, **given)
        assert float(found) == nearly(written_out(new, old, advantages, response, 0.2, 0.3, **given))
        for wrong in ((0.3, 0.2), (9.0, 9.0)):
            assert float(found) != nearly(written_out(new, old, advantages, response, *wrong, **given))
    assert float(found) != nearly(written_out(new, old, advantages, response, 0.2, 0.3))  # without the penalty
    (each := new.nan_to_num().requires_grad_()).retain_grad()
    clipped_loss(each, old, advantages, response).backward()
    ratio = (each - old).detach().exp()
    held = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)
    wanted = -(ratio * advantages * ~held * response) / response.sum(1, keepdim=True) / 3
    assert_close(each.grad, wanted, FORMULA)
    assert is_far(each.grad, -(ratio * advantages * response) / response.sum(1, keepdim=True) / 3, FORMULA)


def test_a_rollout_is_of_the_policy():
    """Groups in order, one row at a time the same log-probabilities, ends counted once, and rewards of what is said."""
    model = policy()
    rollout = sample(model, PROMPTS, 8, 6, seed=3)
    assert rollout.ids.shape[0] == 16 and rollout.start == 3 and ends_of(model) == {END}
    assert rollout.ids[8:, :3].tolist() == [[END, 4, 8]] * 8 and rollout.mask[8:, 0].eq(0).all()
    found = token_log_probs(model, rollout)
    ended = 0
    for n in range(16):
        tokens = rollout.ids[n, rollout.response[n]].tolist()
        said = [token for token in tokens if token != END]
        assert END not in tokens[:-1] and (len(tokens) == rollout.ids.shape[1] - 3 or tokens[-1] == END)
        assert float(rollout.rewards[n]) == float(WANTED in said)
        ids = torch.tensor([[*PROMPTS[n // 8].ids, *tokens]])
        with torch.no_grad():
            alone = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(tokens) :, 0]
        assert is_close(found[n, rollout.response[n]], alone, CLOSE)
        assert (found[n, ~rollout.response[n]] == 0).all()
        ended += len(tokens) < rollout.ids.shape[1] - 3
    assert ended  # the test looks at something
    before = torch.get_rng_state()
    assert torch.equal(sample(model, PROMPTS, 8, 6, seed=3).ids, rollout.ids)
    assert torch.equal(torch.get_rng_state(), before)
    assert sample(model, PROMPTS, 8, 6, seed=4).ids.tolist() != rollout.ids.tolist()
    greedy = sample(model, PROMPTS, 2, 6, seed=0, temperature=0.0)
    assert greedy.ids[0].tolist() == greedy.ids[1].tolist()


def test_it_learns_what_is_rewarded_and_credit_counts():
    seen, told = [], []

    def credit(model, rollout):
        told.append(rollout.number)
        return rollout.advantages * 2

    found, state, _ = train(budget=16, updates=2, on_rollout=lambda number, rollout: seen.append(rollout))
    rewards = [float(rollout.rewards.mean()) for rollout in seen]
    assert len(seen) == 8 and state.step == 16 and sum(rewards[-3:]) > sum(rewards[:3]) + 0.3
    rollout = seen[0]
    wanted = group_advantages(rollout.rewards.view(2, 4)).view(-1, 1) * rollout.response
    assert_close(rollout.advantages, wanted)
    assert_close(rollout.old, token_log_probs(policy(), rollout).detach(), CLOSE)
    doubled, _, _ = train(budget=1, credit=credit, on_rollout=lambda number, rollout: seen.append(rollout))
    assert told == [0] and is_close(seen[-1].advantages, 2 * rollout.advantages)
    assert is_far(doubled, found)


def test_with_nothing_to_choose_nothing_changes_and_a_penalty_holds_it():
    same = [Prompt([2, 7], lambda ids: 1.0)]
    model = policy()
    before = copy.deepcopy(model.state_dict())
    train_policy(model, lambda number: same, budget=2, lr=1e-2, group=4, length=4)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    seen = []
    free, _, _ = train(budget=6)
    held, _, _ = train(budget=6, beta=2.0, on_rollout=lambda number, rollout: seen.append(rollout.reference))
    start = torch.cat([p.detach().flatten() for p in policy().parameters()])
    assert (held - start).norm() != nearly(float((free - start).norm())) and all(x is not None for x in seen)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_it_goes_on_from_a_checkpoint(tmp_path, beta):
    """To the bit, whatever the model is that the second run begins with."""
    given = {"updates": 2, "budget": 6, "beta": beta}
    whole, _, _ = train(**given)
    with pytest.raises(KeyboardInterrupt):

        def stop(state):
            if state.step == 5:
                raise KeyboardInterrupt

        train(**given, checkpoint=Checkpoint(tmp_path, every=4), on_step=stop)
    other = policy()
    other.load_state_dict({name: 0.5 * x for name, x in other.state_dict().items()})
    again, state, _ = train(other, **given, checkpoint=Checkpoint(tmp_path, every=4))
    assert state.step == 6 and torch.equal(again, whole)
    assert is_far(train(**given, seed=1)[0], whole)  # control: other responses
    with pytest.raises(UserError, match="whole rollouts"):
        train(**given, checkpoint=Checkpoint(tmp_path, every=3))
    with pytest.raises(UserError, match="do not part"):
        train(updates=3)
