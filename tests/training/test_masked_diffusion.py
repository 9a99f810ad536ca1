# SPDX-License-Identifier: Apache-2.0
"""LLaDA's loss beside its formula, what batches of the recipe hold, and a model that it made."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.data.texts import Text
from manyheads.experiment import CausalLM
from manyheads.integrations.masked_diffusion import mask_token, predicts_next
from manyheads.models import load
from manyheads.recipes import masked_diffusion_lm as recipe
from manyheads.training.masked_diffusion import corrupt, masked_diffusion_loss
from tiny import chat
from tiny.compare import make_tokenizer, tiny
from tolerance import assert_close, is_close, is_far

PROSE = [Text(text.name, text.content) for text in chat.PROSE]


class Logits(nn.Module):
    def __init__(self, logits, **config):
        super().__init__()
        self.logits, self.config = nn.Parameter(logits), SimpleNamespace(**config)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits)


def drawn(rows=64, length=50):
    ids = torch.randint(9, (rows, length), generator=torch.Generator().manual_seed(1))
    asked = torch.rand(rows, length, generator=torch.Generator().manual_seed(2)) < 0.6
    return ids, asked, corrupt(ids, asked, 9, torch.Generator().manual_seed(3))


def test_shares_are_spread_and_what_is_hidden_counts_by_their_inverse():
    ids, asked, (kept, noisy, weights) = drawn()
    hidden = noisy == 9
    assert torch.equal(kept, ids) and torch.equal(hidden, weights > 0)
    assert not (hidden & ~asked).any() and torch.equal(noisy[~hidden], ids[~hidden])
    for row, shares in zip(hidden, weights, strict=True):
        assert len(shares[row].unique()) <= 1  # one share a row
    share = torch.stack([1 / (row[row > 0][:1] * asked.sum()) for row in weights if row.any()])
    assert share.max() <= 1.001 and share.sort(0).values.diff(dim=0).max() < 0.1  # every stratum
    total = torch.stack([corrupt(ids, asked, 9, torch.Generator().manual_seed(s))[2].sum() for s in range(200)])
    assert abs(float(total.mean()) - 1) < 0.1  # of the bound: each token counts once on average


@pytest.mark.parametrize("shifted", [False, True])
def test_the_loss_is_the_sum_over_hidden_tokens_by_the_share(shifted):
    ids, asked, batch = drawn(4, 6)
    torch.manual_seed(0)
    net = Logits(torch.randn(4, 6, 10, dtype=torch.float64), predicts_next=shifted)
    got = masked_diffusion_loss(net, batch)
    want, wrong = torch.zeros(()).double(), torch.zeros(()).double()
    for i in range(4):
        for j in range(shifted, 6):
            each = -net.logits[i, j - shifted].log_softmax(0)[ids[i, j]] / asked.sum()
            if (weight := batch[2][i, j]) > 0:
                want = want + each * weight * asked.sum()
                wrong = wrong + each
    assert_close(got, want.float(), 1e-5)
    assert is_far(got, wrong.float())
    got.backward()
    hidden = (batch[2] > 0)[:, 1:] if shifted else batch[2] > 0
    moved = net.logits.grad.abs().sum(-1) > 0
    assert torch.equal(moved[:, : hidden.shape[1]], hidden)


def test_lessons_hide_replies_and_their_ends_and_leave_out_what_is_judged():
    net, reader = recipe.small(PROSE, dim=16, layers=1, heads=2, vocab=400)
    assert reader.tokenize("47")[-2:] == ["4", "7"]
    prose = torch.arange(200) % 50 + 300
    batch = recipe.lessons(net, reader, prose, lengths=(40, 60), tokens=600, share=0.4, largest=9)
    for number, shape in ((0, (15, 40)), (1, (10, 60))):
        ids, noisy, weights = batch(number)
        assert ids.shape == shape and torch.equal(batch(number)[1], noisy)
        assert not torch.equal(batch(number + 2)[0], ids)
        sums = round(0.6 * shape[0])
        assert (ids[:sums] < 300).sum() > 0 and ids[sums:].min() >= 300
        for row, hidden in zip(ids[:sums], weights[:sums] > 0, strict=True):
            text = reader.decode(row[row != reader.eos_token_id])
            asked, answer = text.split("?")
            assert asked.startswith("What is") and answer.startswith(" ") and row[-1] == reader.eos_token_id
            prompt = len(reader.encode(asked + "?"))
            assert not hidden[:prompt].any()
    first = {reader.decode(row).split("?")[0] + "?" for row in batch(0)[0][:9]}
    without = recipe.lessons(net, reader, prose, lengths=(40, 60), tokens=600, share=0.4, largest=9, without=first)
    assert not first & {reader.decode(row).split("?")[0] + "?" for row in without(0)[0][:9]}


def test_a_decoder_sees_both_sides_and_keeps_what_it_knows():
    net, reader = tiny(), make_tokenizer(chat.PROSE)
    before = net.get_input_embeddings().weight.detach().clone()
    ids = torch.tensor([[5, 7, 9, 11]])
    later = torch.tensor([[5, 7, 9, 12]])
    assert is_close(net(ids).logits[:, 0], net(later).logits[:, 0])
    recipe.from_decoder(net, reader)
    assert mask_token(net.config) == reader.mask_token_id == len(reader) - 1 and predicts_next(net.config)
    assert is_far(net(ids).logits[:, 0], net(later).logits[:, 0])
    table = net.get_input_embeddings().weight
    assert torch.equal(table[: len(reader) - 1], before[: len(reader) - 1])
    assert is_close(table[reader.mask_token_id], before.mean(0))


def test_the_recipe_makes_a_folder_that_generate_writes_with(tmp_path):
    (tmp_path / "prose.txt").write_text("\n".join(text.content for text in PROSE))
    made = tmp_path / "model"
    options = ["--text", str(tmp_path / "prose.txt"), "--budget", "4 steps", "--tokens", "256", "--lengths", "48"]
    assert recipe.main(["--out", str(made), "--largest", "9", "--device", "cpu", *options]) == 0
    assert not (made / "training").exists()
    net, _ = load(made)
    assert not net.config.is_causal and CausalLM(str(made)).fills_masks and not CausalLM("default").fills_masks
    told = CliRunner().invoke(
        app, ["generate", "--model", str(made), "What is 4 + 7?", "--max-new-tokens", "40", "--json"]
    )
    assert told.exit_code == 0, told.output
    (asked,) = json.loads(told.stdout)["prompts"]
    full, dpad = asked["replies"]
    assert dpad["arm"].startswith("dpad") and full["held_bytes"] == 0 and full["forwards"] == 40
    assert dpad["notes"]["tokens_read"] <= full["notes"]["tokens_read"]
    with pytest.raises(SystemExit):
        recipe.main(["--out", str(made), *options])
