# SPDX-License-Identifier: Apache-2.0
"""The loop: steps are those of torch written out, budgets end it, accumulation and terms are sums of gradients."""

import time

import pytest
import torch
from torch import nn

from manyheads.errors import UserError
from manyheads.training import Budget, Diverged, TrainState, decay, fit
from tolerance import assert_close, is_far, nearly


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def rows(step, count=8):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(count, 6, generator=generator, dtype=torch.float64)
    return x, x[:, :3].cumsum(1)


def loss(net, batch):
    return (net(batch[0]) - batch[1]).square().mean()


def adamw(net, lr=1e-2):
    return [torch.optim.AdamW(net.parameters(), lr=lr)]


def trained(get_batch=rows, loss=loss, **given):
    net = model()
    state = fit(net, get_batch, loss, **{"budget": 10, "optimizers": adamw(net), **given})
    return torch.cat([p.detach().flatten() for p in net.parameters()]), state


def test_a_run_is_torch_written_out():
    net = model()
    (optimizer,) = adamw(net)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 4) * (1 - step / 10))
    losses = []
    for step in range(10):
        value = loss(net, rows(step))
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(value.item())
    wanted = torch.cat([p.detach().flatten() for p in net.parameters()])
    found, state = trained(schedule=decay("linear", warmup=4), clip=0.5)
    assert_close(found, wanted)
    assert state.losses == losses and state.step == 10 and state.finished
    for wrong in ({"clip": None}, {"schedule": None, "clip": 0.5}, {"get_batch": lambda step: rows(step + 1)}):
        assert is_far(trained(**{"schedule": decay("linear", warmup=4), "clip": 0.5, **wrong})[0], wanted)


def test_two_batches_accumulated_are_one_of_twice_the_size():
    def both(step):
        return tuple(torch.cat(part) for part in zip(rows(2 * step), rows(2 * step + 1), strict=True))

    wanted, one = trained(both)
    found, two = trained(accumulate=2)
    assert_close(found, wanted)
    assert one.losses == nearly(two.losses) and two.step == 10
    assert is_far(trained()[0], wanted)


def test_terms_of_a_loss_are_added_one_after_the_other():
    order = []

    def terms(net, batch):
        for part in range(3):
            order.append(("asked", part, net[0].weight.grad is not None))
            yield (net(batch[0]) - batch[1])[:, part].square().mean() / 3

    found, state = trained(loss=terms)
    wanted, whole = trained()
    assert_close(found, wanted)
    assert state.losses == nearly(whole.losses)
    assert order[:3] == [("asked", 0, False), ("asked", 1, True), ("asked", 2, True)]  # each backward before the next


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_budget_in_tokens_ends_the_run(accumulate):
    _, state = trained(budget=Budget(50, "tokens"), tokens_of=lambda batch: len(batch[0]), accumulate=accumulate)
    assert (state.step, state.tokens) == ((7, 56) if accumulate == 1 else (4, 64))
    with pytest.raises(UserError, match="tokens_of"):
        trained(budget="50")


def test_a_budget_in_seconds_ends_the_run(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow(step):
        clock[0] += 2.0
        return rows(step)

    state = TrainState(Budget(9, "seconds"))
    seen = []
    trained(slow, budget=state, on_step=lambda s: seen.append(s.progress))
    assert state.step == 5 and state.seconds == 10 and seen == [2 / 9, 4 / 9, 6 / 9, 8 / 9, 10 / 9]
    clock[0] = 0.0
    assert trained(slow, budget="8s")[1].step == 4


def test_batches_that_warm_up_cost_and_change_nothing(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def measured(net, batch):
        clock[0] += 5.0 if len(batch[0]) == 2 else 1.0
        return loss(net, batch)

    wanted, plain = trained(loss=measured, budget="6s")
    found, warm = trained(loss=measured, budget="6s", warm=[rows(0, 2)])
    assert torch.equal(found, wanted) and plain.step == warm.step == 6


def test_on_step_may_end_it_and_parameters_outside_the_model_are_clipped_too():
    assert trained(on_step=lambda state: state.step == 3)[1].step == 3
    net, extra = model(), nn.Parameter(torch.full((3,), 1e3, dtype=torch.float64))
    optimizer = torch.optim.SGD([*net.parameters(), extra], lr=1.0)
    before = [p.detach().clone() for p in (*net.parameters(), extra)]
    fit(net, rows, lambda n, b: loss(n, b) + extra.square().sum(), budget=1, optimizers=[optimizer], clip=0.1)
    moved = torch.cat([(p.detach() - q).flatten() for p, q in zip((*net.parameters(), extra), before, strict=True)])
    assert float(moved.norm()) == pytest.approx(0.1, rel=1e-4)


def test_nan_ends_the_run_soon():
    seen = []
    with pytest.raises(Diverged, match="by step 50"):
        trained(loss=lambda n, b: loss(n, b) * float("nan"), budget=500, on_step=lambda s: seen.append(s.step))
    assert len(seen) == 49


def test_bfloat16_is_used_when_asked_for():
    seen = []

    def typed(net, batch):
        out = net(batch[0].float())
        seen.append(out.dtype)
        return out.float().square().mean()

    for bf16, wanted in ((True, torch.bfloat16), (None, torch.float32), (False, torch.float32)):
        net = model().float()
        fit(net, rows, typed, budget=1, optimizers=adamw(net), bf16=bf16)
        assert seen.pop() == wanted and net[0].weight.dtype == torch.float32


def test_compiling_is_asked_for_and_whole(monkeypatch):
    asked = []

    def compiler(function, **given):
        asked.append(given)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    trained()
    assert not asked
    trained(compiled=True)
    assert asked == [{"dynamic": False, "fullgraph": True}]


def test_a_cpu_replays_nothing():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="on a GPU"):
        fit(net, lambda step: torch.ones(1, 2), lambda m, x: m(x).sum(), budget=1, replayed=True,
            optimizers=[torch.optim.AdamW(net.parameters())])  # fmt: skip
