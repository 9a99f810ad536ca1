# SPDX-License-Identifier: Apache-2.0
"""Models of Bigram-Backcopy: every option changes the training, and losses are those of the model as it is used."""

from types import SimpleNamespace

import pytest
import torch

from manyheads.experiment import Arm
from manyheads.tasks.lenses.bigram_backcopy import BigramBackcopy, _untrained
from oracles.tasks import context, rows, values
from tolerance import DRAWN, WRONG, spread_error

TASK = BigramBackcopy(steps=60, dim=16, length=16, batch=8, sequences=8, letters="code", lr=1e-2)
OPTIONS = {
    "ReLU": {}, "SGD": {"optimizer": "sgd", "lr": 1e-3}, "KV bias": {"kv_bias": True}, "DyT": {"dyt": True},
    "TVR": {"tvr": True}, "DyT and TVR": {"dyt": True, "tvr": True}, "deep": {"layers": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def found():
    specs = {"ReLU": "active_dormant.relu_attention"}
    arms = [Arm(name, specs.get(name, ""), options={"train": given}) for name, given in OPTIONS.items()]
    return rows(TASK, context(Arm("plain"), *arms, Arm("of another task", options={"replace": "zero"})))


def test_arms_are_trained_and_others_left_out(found):
    plain = values(found, "loss", "plain", rows="all")
    assert {row.arm for row in found} == {"plain", *OPTIONS}
    for arm in OPTIONS:
        assert (values(found, "loss", arm, rows="all") != plain).any(), arm
    assert (values(found, "loss", "SGD", rows="others") > values(found, "loss", "plain", rows="others")).mean() > 0.5


def test_only_a_kv_bias_has_an_extra_slot(found):
    assert {row.arm for row in found if row.metric == "extra_slot"} == {"KV bias"}
    slot = values(found, "extra_slot")
    assert ((slot > 0) & (slot < 1)).all()


def test_a_head_is_ablated_where_there_is_one(found):
    ablated = {row.arm for row in found if row.metric == "added_loss"}
    assert ablated == {"plain", *OPTIONS} - {"deep"}
    assert (values(found, "added_loss", "plain", rows="all", head="taken out") != 0).all()


def test_a_unit_repeats_to_the_bit(found):
    run = context(Arm("plain"))
    assert rows(TASK, run) == [row for row in found if row.arm == "plain"]


def test_the_target_of_tvr_is_twice_as_large_with_dyt(monkeypatch):
    from manyheads.tasks.lenses import bigram_backcopy

    seen = []
    monkeypatch.setattr(bigram_backcopy, "_rescale", lambda model, optimizer, dim, target: seen.append(target))
    arms = [Arm(name, options={"train": OPTIONS[name]}) for name in ("TVR", "DyT and TVR")]
    rows(TASK, context(Arm("plain"), *arms))
    assert seen == [0.01, 0.02]


def test_weights_start_uniform_by_their_inputs():
    """Between plus and minus the root of 1 / inputs, biases 0; the last layer has more outputs."""
    torch.manual_seed(0)
    model = _untrained(SimpleNamespace(vocab=200, bos=0), 48, 2, 16)
    sizes = []
    for module in model.modules():
        if type(module).__name__ in ("Conv1D", "Linear"):
            weight = module.weight.detach() if type(module).__name__ == "Linear" else module.weight.detach().T
            assert weight.abs().max() <= weight.shape[1] ** -0.5 and (module.bias is None or not module.bias.any())
            sizes.append(weight.flatten() * weight.shape[1] ** 0.5)
            found, draws = float(weight.square().mean().sqrt()), weight.numel()
            if weight.shape[0] != weight.shape[1]:
                assert spread_error(found, (3 * weight.shape[0]) ** -0.5, draws, kurtosis=1.8) > WRONG
    drawn = torch.cat(sizes)
    assert spread_error(float(drawn.square().mean().sqrt()), 3**-0.5, drawn.numel(), kurtosis=1.8) < DRAWN
    embedding = model.get_input_embeddings().weight.detach()
    assert spread_error(float(embedding.std()), 1.0, embedding.numel()) < DRAWN
