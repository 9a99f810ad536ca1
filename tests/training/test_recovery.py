# SPDX-License-Identifier: Apache-2.0
"""Recovery: the divergence in parts of the vocabulary is that of the formula, and training brings it down."""

import copy

import pytest
import torch
from torch.nn.functional import kl_div

from manyheads.conversion import Prune, Recovery, SurgeryPlan
from manyheads.errors import UserError
from manyheads.integrations.surgery import converted
from manyheads.training.recovery import recover, vocabulary_kl
from oracles.conversions import tiny
from tolerance import FORMULA, assert_close, is_far

PLAN = SurgeryPlan((Prune(axis="neurons", keep=tuple(range(24))),))


def drawn(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_divergence_is_that_of_whole_logits_forward_and_backward(chunk):
    s, w, t, u = drawn(5, 6), drawn(23, 6, seed=1), drawn(5, 4, seed=2), drawn(23, 4, seed=3)
    leaves = [s.clone().requires_grad_(), w.clone().requires_grad_()]
    twins = [s.clone().requires_grad_(), w.clone().requires_grad_()]
    got = vocabulary_kl(leaves[0], leaves[1], t, u, chunk)
    mine, theirs = (twins[0] @ twins[1].mT).log_softmax(-1), (t @ u.mT).log_softmax(-1)
    want = kl_div(mine, theirs, reduction="batchmean", log_target=True)
    (3 * got).backward()
    (3 * want).backward()
    assert_close(got, want, 4 * FORMULA)
    for mine, theirs in zip(leaves, twins, strict=True):
        assert_close(mine.grad, theirs.grad, 4 * FORMULA)
    assert is_far(got, kl_div((t @ u.mT).log_softmax(-1), (s @ w.mT).log_softmax(-1), reduction="batchmean",
                              log_target=True), 4 * FORMULA)  # the other way round  # fmt: skip


def test_a_model_has_no_divergence_from_itself():
    s, w = drawn(4, 6).requires_grad_(), drawn(11, 6, seed=1).requires_grad_()
    loss = vocabulary_kl(s, w, s.detach(), w.detach(), 3)
    loss.backward()
    assert abs(loss.item()) < 1e-14 and float(s.grad.abs().max()) < 1e-14


def test_gradients_are_numerical_ones():
    args = [drawn(3, 4).requires_grad_(), drawn(9, 4, seed=1).requires_grad_(), drawn(3, 5), drawn(9, 5, seed=4)]
    assert torch.autograd.gradcheck(lambda s, w: vocabulary_kl(s, w, args[2], args[3], 4), args[:2])


def batches(number):
    return torch.randint(61, (4, 13), generator=torch.Generator().manual_seed(number % 4))


@pytest.mark.parametrize("how", [
    Recovery(lr=1e-2), Recovery(lr=1e-2, lora=4), Recovery(loss="nll", lr=1e-2), Recovery(lr=1e-2, correct=0.5),
], ids=["all", "lora", "nll", "corrected"])  # fmt: skip
def test_training_lowers_the_loss_and_leaves_the_teacher(how):
    teacher = tiny("llama").float()
    before = copy.deepcopy(teacher.state_dict())
    student = copy.deepcopy(converted(teacher, PLAN)).bfloat16()
    student.model.rotary_emb.inv_freq = teacher.model.rotary_emb.inv_freq.clone()  # as a loaded one has it
    names = set(student.state_dict())
    state = recover(student, teacher, lambda _: batches(0), 12, how)
    assert state.losses[-1] < state.losses[0]
    assert all(torch.equal(before[name], x) for name, x in teacher.state_dict().items())
    assert set(student.state_dict()) == names and next(student.parameters()).dtype == torch.bfloat16
    assert torch.equal(student.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq)  # not rounded
    assert all(p.requires_grad for p in student.parameters()) and not student.training
    assert state.step == (6 if how.correct else 12)


def test_only_what_is_named_is_trained():
    teacher = tiny("llama").float()
    student = copy.deepcopy(converted(teacher, PLAN))
    before = copy.deepcopy(student.state_dict())
    recover(student, teacher, batches, 2, Recovery(lr=1e-2, trained=r"mlp\."))
    changed = {name for name, x in student.state_dict().items() if not torch.equal(x, before[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_a_training_that_was_cut_off_goes_on(tmp_path):
    teacher = tiny("llama").float()
    whole, parts = (copy.deepcopy(converted(teacher, PLAN)) for _ in range(2))
    recover(whole, teacher, batches, 6, Recovery(lr=1e-2))

    class Stopped(Exception):
        pass

    def stop(state):
        if state.step == 3:
            raise Stopped

    from manyheads.training import recovery

    every = recovery.Checkpoint
    recovery.Checkpoint = lambda folder, seconds: every(folder, every=2)
    try:
        with pytest.raises(Stopped):
            recover(parts, teacher, batches, 6, Recovery(lr=1e-2), folder=tmp_path, on_step=stop)
        again = copy.deepcopy(converted(teacher, PLAN))
        recover(again, teacher, batches, 6, Recovery(lr=1e-2), folder=tmp_path)
    finally:
        recovery.Checkpoint = every
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in whole.state_dict().items())


def test_encoders_recover_by_their_states():
    teacher = tiny("bert").float()
    student = copy.deepcopy(converted(teacher, PLAN))
    state = recover(student, teacher, lambda _: batches(0), 8, Recovery(loss="hidden", lr=1e-2))
    assert state.losses[-1] < state.losses[0]
    with pytest.raises(UserError, match="hidden states"):
        recover(student, teacher, batches, 1, Recovery())
