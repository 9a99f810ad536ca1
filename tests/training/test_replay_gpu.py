# SPDX-License-Identifier: Apache-2.0
"""Replayed steps are the steps: losses and weights as without, whatever the schedule; what cannot be is said."""

import warnings

import pytest
import torch
from torch import nn

from manyheads import kernels
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.training import decay, fit, next_token_loss, optimizers_of
from manyheads.training.replay import Replayed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not kernels.available(), reason="needs a CUDA device and triton"),
]


def ids(step, rows=4):
    generator = torch.Generator().manual_seed(step)
    batch = torch.randint(32, (rows, 25), generator=generator).cuda()
    return batch, torch.rand(rows, 24, generator=generator).cuda()


def trained(optimizer, batches=ids, replayed=True, schedule=True, loss=next_token_loss, mixer="softmax"):
    torch.manual_seed(0)
    net = Decoder(mixer, DecoderConfig(32, 32, 2, 2, length=24)).cuda()
    state = fit(
        net, batches, loss, budget=16, optimizers=optimizers_of(net, 1e-2, optimizer), replayed=replayed, bf16=False,
        schedule=decay("cosine", warmup=0.2, floor=0.1) if schedule else None,
    )  # fmt: skip
    return torch.tensor(state.losses), torch.cat([x.flatten() for x in net.state_dict().values()])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_replayed_steps_are_the_steps(optimizer):
    plain, held = trained(optimizer, replayed=False)
    found, weights = trained(optimizer)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-3)
    assert (weights - held).norm() < 0.01 * held.norm()
    for wrong in ({"schedule": False}, {"batches": lambda step: ids(min(step, 3))}):  # a rate, a batch of the recording
        assert (trained(optimizer, **wrong)[0] - plain).abs().max() > 6e-3


def test_a_codebook_follows_its_keys_in_replayed_steps():
    vq = {"mixer": "longvq:codes=8,block=4,key_dim=8"}
    plain, held = trained("adamw", replayed=False, **vq)
    found, weights = trained("adamw", **vq)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-3)
    assert (weights - held).norm() < 0.01 * held.norm()
    stopped = trained("adamw", replayed=False, mixer=f"{vq['mixer']},gamma=1,dead=0")[1]  # control: it stays
    assert (stopped - held).norm() > 0.03 * held.norm()


def test_a_batch_of_another_shape_runs_as_it_is():
    def batches(step):
        return ids(step, 3 if step == 9 else 4)

    plain, _ = trained("adamw", batches, replayed=False)
    found, _ = trained("adamw", batches)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-3)
    assert (found - trained("adamw")[0]).abs()[9] > 6e-3


def test_a_step_that_waits_goes_on_without():
    def waits(model, batch):
        made = next_token_loss(model, batch)
        return made * (2.0 if made.item() > 1e9 else 1.0)

    plain, _ = trained("adamw", replayed=False)
    with pytest.warns(UserWarning, match="not replayed"):
        found, _ = trained("adamw", loss=waits)
    torch.testing.assert_close(found, plain, rtol=0, atol=2e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained("adamw")


def test_rates_are_on_the_device():
    net = nn.Linear(2, 2).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.25)
    Replayed(lambda batch: batch.sum(), [optimizer], torch.device("cuda"))
    assert optimizer.param_groups[0]["lr"].item() == 0.25 and optimizer.param_groups[0]["lr"].is_cuda
