# SPDX-License-Identifier: Apache-2.0
"""Tasks on masked diffusion language models: one training for all arms, and values recomputed from what is written."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from manyheads import UserError, parse
from manyheads.data.word_problems import last_number
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.integrations.masked_diffusion import TokenDenoiser
from manyheads.recipes import masked_diffusion_lm as recipe
from manyheads.tasks.training.denoised_prose import DenoisedProse
from manyheads.tasks.training.denoised_sums import DenoisedSums
from tiny import chat
from tolerance import assert_close, nearly

SIZE = {"dim": 16, "layers": 1, "heads": 2, "steps": 2, "tokens": 256, "lengths": (48,), "room": 24, "vocab": 400}
FULL, DPAD = Arm("full", "block_diffusion:block=8"), Arm("dpad", "dpad:block=8,window=8")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("manyheads.recipes._adapters.texts", lambda name: chat.PROSE)
    monkeypatch.setattr("manyheads.tasks.training.denoised_prose.corpus", lambda name: chat.PROSE)
    return RunContext(Trainable(), (FULL, DPAD), folder=tmp_path)


def rows(task, run):
    return [row for unit in task.units(run) for row in task.measure(run, unit)]


def test_sums_are_written_once_trained_and_judged_by_their_last_number(run, monkeypatch):
    task = DenoisedSums(**SIZE, samples=6, at_once=4)
    found = rows(task, run)
    model, tokenizer, loss = task.trained(run, 0)
    problems = task.problems(run, 256, "test")[:6]
    for arm in (FULL, DPAD):
        mine = {(row.metric, row.sample): row.value for row in found if row.arm == arm.key}
        assert mine["training_nll", "training"] == nearly(loss)
        for i, problem in enumerate(problems):
            prompt = torch.tensor([recipe.solved_row(tokenizer, problem)[0]])
            (made,) = parse(arm.strategy.spec).write_rows(
                TokenDenoiser(model), prompt, 24, ends={tokenizer.eos_token_id}
            )
            text = tokenizer.decode(made.tokens)
            assert mine["solved", f"{i}"] == (last_number(text) == problem.result)
            assert mine["forwards", f"{i}"] == made.forwards and mine["written", f"{i}"] == len(made.tokens)
            assert mine["read", f"{i}"] == made.notes["tokens_read"]
    read = [sum(r.value for r in found if r.metric == "read" and r.arm == arm.key) for arm in (FULL, DPAD)]
    assert read[1] < read[0] and all(row.value > 0 for row in found if row.metric == "ms")
    monkeypatch.setattr(DenoisedSums, "_train", lambda *_: pytest.fail("trained twice"))
    again = RunContext(Trainable(), (FULL,), folder=run.folder)
    other = task.trained(again, 0)
    assert torch.equal(other[0].lm_head.weight, model.lm_head.weight) and other[2] == nearly(loss)


def test_prose_is_judged_on_what_is_hidden_of_a_block(run):
    task = DenoisedProse(**SIZE, windows=5, before=10)
    found = rows(task, run)
    model, tokenizer, _ = task.trained(run, 0)
    ids = torch.tensor([i for text in chat.PROSE for i in tokenizer.encode(text.content)])
    starts = torch.randint(len(ids) - 18, (5, 1), generator=run.torch_rng(windows="prose"))[:, 0]
    for arm, kept in ((FULL, range(16)), (DPAD, parse(DPAD.strategy.spec).kept(16, torch.Generator().manual_seed(0)))):
        mine = [row.value for row in found if row.arm == arm.key and row.at["hidden"] == "all"]
        for value, start in zip(mine, starts.tolist(), strict=True):
            window = ids[start : start + 18]
            mask = tokenizer.mask_token_id
            read = torch.cat([window[:10], torch.full((8 + len(kept),), mask)])[None]
            places = torch.tensor([*range(18), *(18 + int(j) for j in kept)])[None]
            logits = model(input_ids=read, position_ids=places).logits[0, 10:18].float()
            logits[:, mask] = -torch.inf
            assert_close(value, cross_entropy(logits, window[10:]), 1e-5)
    half = [row.value for row in found if row.at["hidden"] == "half"]
    assert len(half) == 10 and half[:5] != mine


def test_an_arm_that_fills_no_blocks_is_refused(run):
    task = DenoisedSums(**SIZE)
    with pytest.raises(UserError, match="give it dpad"):
        task.guard(RunContext(Trainable(), (FULL, Arm("sampling", "sampling"))))
    task.guard(run)
