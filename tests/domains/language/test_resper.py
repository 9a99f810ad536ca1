# SPDX-License-Identifier: Apache-2.0
"""resper: attention, encoder and labels by their formulas, causality, padding, feedback, whose turns are learned."""

import dataclasses

import numpy as np
import pytest
import torch

from manyheads.attention.reference import causal_mask
from manyheads.domains.language.resper import DialogueModel, Resper, UtteranceEncoder, self_attention
from manyheads.domains.language.turn_classes import TurnClasses
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.language._turn_task import turn_loss
from tiny.labelled_dialogues import dialogues
from tolerance import CLOSE, DEEP, FORMULA, is_close, is_far

__all__ = ["dialogues"]

U, T, D, H, C, N = 4, 7, 6, 5, 3, 6
VARIANTS = ("base", "f", "sf")


@pytest.fixture
def turns():
    """Words and which of them are there, 7, 1, 3 and 5."""
    torch.manual_seed(0)
    return torch.randn(U, T, D, dtype=torch.float64), torch.arange(T) < torch.tensor([[7], [1], [3], [5]])


def model_of(variant="sf", feedback=True, rate=0.0):
    torch.manual_seed(1)
    return DialogueModel(torch.nn.Identity(), D, H, 9, C, variant, feedback, rate).double().eval()


def spoken(seed=2, lengths=(N, 4)):
    """Vectors of the turns of two dialogues, which of them are there, and which resist."""
    torch.manual_seed(seed)
    mask = torch.arange(N) < torch.tensor(lengths)[:, None]
    own = torch.tensor([[False, True, False, True, True, False], [True, False, False, True, False, False]]) & mask
    return torch.randn(2, N, H, dtype=torch.float64), mask, own


def gru(cell, inputs, reverse=False):
    """Hidden states of a GRU by its equations."""
    end = "_reverse" if reverse else ""
    w, u, b, c = (
        getattr(cell, f"{name}_l0{end}").detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    size, found = u.shape[1], []
    h = torch.zeros(size, dtype=torch.float64)
    for x in inputs.flip(0) if reverse else inputs:
        (xr, xz, xn), (hr, hz, hn) = (w @ x + b).split(size), (u @ h + c).split(size)
        z = torch.sigmoid(xz + hz)
        h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
        found.append(h)
    return torch.stack(found[::-1] if reverse else found)


def attended(h, scale=1.0):
    return torch.stack([((e := torch.exp(scale * (h @ one))) / e.sum()) @ h for one in h])


def encoded(made, words, scale=1.0, pad=0):
    """u of a turn by the formula; ``pad`` words of zeros count, as in the released code."""
    left, right = gru(made.gru, words), gru(made.gru, words, True)
    parts = {"base": [left, right], "f": [left, words, right]}.get(
        made.variant, [attended(left, scale), left, words, right, attended(right, scale)]
    )
    joined = torch.cat(parts, -1)
    joined = torch.cat((joined, torch.zeros(pad, joined.shape[1], dtype=torch.float64)))
    return torch.tanh(joined @ made.out.weight.detach().T + made.out.bias.detach()).max(0).values


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_turn_is_the_formula_and_padding_words_change_nothing(turns, variant):
    words, mask = turns
    torch.manual_seed(0)
    made = UtteranceEncoder(D, H, variant).double()
    with torch.no_grad():
        found = made(words, mask)
        noise = torch.where(mask[..., None], words, 100 * torch.randn_like(words))
        assert is_close(made(noise, mask), found, FORMULA)
        assert is_far(made(noise, torch.ones_like(mask)), found, FORMULA)
        assert is_close(made(words[1:2, :1], mask[1:2, :1]), found[1:2], FORMULA)
    want = torch.stack([encoded(made, one[there]) for one, there in zip(words, mask, strict=True)])
    assert is_close(found, want, DEEP)
    if variant == "sf":
        scaled = torch.stack([encoded(made, one[there], H**-0.5) for one, there in zip(words, mask, strict=True)])
        assert is_far(scaled, want, DEEP)
    padded = torch.stack([encoded(made, one[there], pad=2) for one, there in zip(words, mask, strict=True)])
    assert is_far(padded, want, DEEP)


def test_attention_of_a_turn_is_over_the_turns_so_far():
    states, mask, _ = spoken()
    causal = causal_mask(N, N) & mask[:, None]
    out, weights = self_attention(states, causal)
    assert is_close(weights.sum(-1), torch.ones(2, N).double(), FORMULA) and float(weights[~causal].abs().max()) == 0
    for b, n in ((0, 3), (1, 2)):
        assert is_close(out[b, n], attended(states[b, : n + 1])[n], FORMULA)
    # The released code multiplies scores by -1e10 where a turn is later: a negative score takes all weight.
    factor = torch.where(causal_mask(N, N), 1.0, -1e10).double()
    wrong = (states @ states.mT * factor).softmax(-1)
    assert float(wrong[0][~causal_mask(N, N)].sum()) > 1
    assert is_close(out[:, 0], states[:, 0], FORMULA)  # a first turn has itself alone


def by_formula(model, states, own, feedback=True):
    """Logits of one dialogue's turns, one after the other."""
    c, rows, said = gru(model.dialogue, states), [], torch.zeros(C, dtype=torch.float64)
    for n, u in enumerate(states):
        parts = {"base": [c[n]], "f": [c[n], u]}.get(model.variant, [attended(c[: n + 1])[n], c[n], u])
        x = torch.tanh(model.join(torch.cat(parts)))
        given = torch.cat((x, said)) if model.told is not None else x
        weight = model.first.weight if model.told is None else torch.cat((model.first.weight, model.told.weight), 1)
        rows.append(model.last(weight @ given + model.first.bias))
        if own[n] and feedback:
            said = rows[-1].softmax(-1)
    return torch.stack(rows)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("feedback", [True, False])
def test_labels_are_the_formula(variant, feedback):
    model, (states, mask, own) = model_of(variant, feedback), spoken()
    with torch.no_grad():
        found = model.label(states, mask, own)
        for b in range(2):
            count = int(mask[b].sum())
            want = by_formula(model, states[b, :count], own[b])
            assert is_close(found[b, :count], want, DEEP)
            if feedback:  # without it, or of all turns
                assert is_far(by_formula(model, states[b, :count], own[b], False), want, DEEP)
                assert is_far(by_formula(model, states[b, :count], torch.ones(N).bool()), want, DEEP)


@pytest.mark.parametrize("variant", VARIANTS)
def test_later_turns_change_nothing(variant):
    model, (states, mask, own) = model_of(variant), spoken()
    other = spoken(3)[0]
    with torch.no_grad():
        found = model.label(states, mask, own)
        for n in range(1, N):
            changed = torch.cat((states[:, :n], other[:, n:]), 1)
            told = model.label(changed, mask, own)
            assert is_close(told[:, :n], found[:, :n], FORMULA) and is_far(told[0, n:], found[0, n:], FORMULA)
        model.dialogue = torch.nn.GRU(H, D // 2, batch_first=True, bidirectional=True).double()
        one, two = (model.label(given, mask, own) for given in (states, torch.cat((states[:, :2], other[:, 2:]), 1)))
        assert is_far(one[:, :2], two[:, :2], FORMULA)  # control: a second direction sees them


def test_base_is_sf_without_what_it_joins(turns):
    """With columns of zeros for attention and raw inputs, sf is f and base with the columns that are left."""
    words, mask = turns
    whole = model_of("sf")
    cut = {"base": (slice(H, 2 * H), slice(2 * H + D, 3 * H + D)), "f": (slice(H, 3 * H + D),)}
    kept = {"base": slice(D, 2 * D), "f": slice(D, 2 * D + H)}
    states, there, own = spoken()
    for variant in ("base", "f"):
        small = model_of(variant)
        small.load_state_dict(
            {k: x for k, x in whole.state_dict().items() if ".out.w" not in k and "join.w" not in k}, strict=False
        )
        zeroed = model_of("sf")
        zeroed.load_state_dict(whole.state_dict())
        with torch.no_grad():
            out, join = whole.utterance.out.weight, whole.join.weight
            small.utterance.out.weight.copy_(torch.cat([out[:, one] for one in cut[variant]], 1))
            small.join.weight.copy_(join[:, kept[variant]])
            for weight, parts in ((zeroed.utterance.out.weight, cut[variant]), (zeroed.join.weight, (kept[variant],))):
                stay = torch.zeros(weight.shape[1], dtype=torch.bool)
                for one in parts:
                    stay[one] = True
                weight[:, ~stay] = 0
            assert is_close(zeroed.utterance(words, mask), small.utterance(words, mask), FORMULA)
            assert is_far(whole.utterance(words, mask), small.utterance(words, mask), FORMULA)
            assert is_close(zeroed.label(states, there, own), small.label(states, there, own), FORMULA)
            assert is_far(whole.label(states, there, own), small.label(states, there, own), FORMULA)


def test_turns_of_others_are_not_learned():
    model, (states, mask, own) = model_of(), spoken()
    targets = torch.where(own, 1, -1)
    logits = model.label(states, mask, own).detach().requires_grad_()
    loss = turn_loss(logits, targets)
    loss.backward()
    assert float(logits.grad[~own].abs().max()) == 0 < float(logits.grad[own].abs().min())
    want = -logits.detach()[own].log_softmax(-1)[:, 1].mean()
    assert is_close(loss, want, CLOSE) and is_far(turn_loss(logits, torch.where(mask, 1, -1)), want, CLOSE)
    assert float(turn_loss(logits.detach(), torch.full_like(targets, -1))) == 0


def test_the_feedback_learns_through_earlier_turns():
    """The loss of a last own turn reaches the vectors of turns before it through their scores alone too."""
    model, (states, mask, own) = model_of(), spoken()
    hidden = model.told.weight.detach().clone()
    grads = []
    for zero in (False, True):
        with torch.no_grad():
            model.told.weight.copy_(torch.zeros_like(hidden) if zero else hidden)
        given = states.clone().requires_grad_()
        model.label(given, mask, own)[0, 4, 1].backward()
        grads.append(given.grad[0, 3])
    assert is_far(grads[0], grads[1], DEEP)


def test_a_batch_of_real_turns(dialogues):
    """Words to logits: each dialogue alone is the dialogue in its batch, which fills up turns and words."""
    recipe = Resper()
    torch.manual_seed(0)
    model = recipe.build(dialogues, 8).double().eval()
    samples = dialogues.samples("train")[:4]
    with torch.no_grad():
        whole = model(dialogues.collate(samples))
        for b, sample in enumerate(samples):
            alone = model(dialogues.collate([sample]))[0]
            assert is_close(whole[b, : len(sample.inputs)], alone, DEEP)
        other = dataclasses.replace(samples[0], inputs=("who are they", *samples[0].inputs[1:]))
        assert is_far(model(dialogues.collate([other]))[0], whole[0, : len(other.inputs)], DEEP)


def test_attention_to_turns_is_shown(dialogues):
    recipe = Resper()
    model = recipe.build(dialogues, 8).eval()
    batch = dialogues.collate(dialogues.samples("train")[:2])
    with torch.no_grad():
        (picture,) = recipe.pictures(model, batch)
    own = [n for n, one in enumerate(batch["own"][0].tolist()) if one]
    assert picture.rows == [str(n + 1) for n in own] and len(picture.columns) == int(batch["mask"][0].sum())
    assert all(abs(sum(row) - 1) < 1e-5 and not any(row[n + 1 :]) for n, row in zip(own, picture.values, strict=True))
    assert Resper(variant="f").pictures(model, batch) == ()


def test_what_cannot_be_is_refused():
    class Other:
        dim, name, dropout = 8, "other", 0.0

    for spec in ("hidden=0", "variant=g"):
        with pytest.raises(UserError, match="resper"):
            parse(f"resper:{spec}")
    with pytest.raises(UserError, match="resisting_strategies"):
        Resper().build(Other(), 8)
    with pytest.raises(UserError, match="resisting_strategies"):
        list(TurnClasses().run(Other(), np.random.default_rng(0)))
