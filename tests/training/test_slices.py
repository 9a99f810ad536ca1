# SPDX-License-Identifier: Apache-2.0
"""Only the rows and columns of the chosen heads are tuned: every other bit stays, whatever the optimiser does."""

import pytest
import torch

import manyheads
from manyheads.data import gender_bias
from manyheads.data.gender_bias import Profession
from manyheads.errors import UserError
from manyheads.integrations.head_weights import head_parts
from manyheads.integrations.transformers import find_sites
from manyheads.models import load
from manyheads.recipes.gender_components import balanced_batches, main, tune_heads
from manyheads.training import fit, next_token_loss
from manyheads.training.slices import OwnSlices, Slice, train_slices
from oracles import models
from tiny import chat as tiny
from tolerance import SAME, assert_close, is_far

HEADS = ("0.1", "1.3")
PARTS = {"llama": "qkvo", "gpt2": "qkv", "phi3": "qvo", "qwen2": "qk"}


def batch(number):
    return models.tokens(4, 12, seed=number)


def inside(model, parts):
    """For each parameter, True where the heads' numbers are; read off the shapes once more, by hand."""
    made = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for name in made:
        layer = next((int(part) for part in name.split(".") if part.isdecimal()), None)
        heads = [int(h.split(".")[1]) for h in HEADS if h.startswith(f"{layer}.")]
        for head in heads:
            rows, group = slice(8 * head, 8 * head + 8), 8 * (head // 2)  # two heads share keys and values
            shared = slice(group, group + 8)
            for part, where in zip("qkv", (rows, shared, shared), strict=True):
                if part in parts and f".{part}_proj" in name:
                    made[name][where] = True
            if "o" in parts and name.endswith("o_proj.weight"):
                made[name][:, rows] = True
            if name.endswith("qkv_proj.weight"):  # phi3: 32 rows of queries, 16 of keys, 16 of values
                made[name][rows] |= "q" in parts
                made[name][48 + group : 56 + group] |= "v" in parts
            if ".c_attn." in name:  # gpt2: transposed, a third each of queries, keys and values
                for third in range(3):
                    made[name][..., 32 * third + 8 * head : 32 * third + 8 * head + 8] = True
    return made


def moved(model, before):
    return {name: p.detach() != before[name] for name, p in model.named_parameters()}


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", PARTS)
def test_nothing_else_changes_by_a_bit(name):
    """AdamW with much decay, three steps: what moved are the heads' numbers, all of them and no others."""
    model = models.build(name)
    before, want = copied(model), inside(model, PARTS[name])
    count = tune_heads(model, lambda n: (batch(n), torch.ones(4, 11)), HEADS, parts=PARTS[name], budget=3, lr=1e-2,
                       weight_decay=0.1)  # fmt: skip
    found = moved(model, before)
    assert count == sum(int(mask.sum()) for mask in want.values())
    for parameter, mask in want.items():
        assert not (found[parameter] & ~mask).any(), parameter
        # Keys' biases move no logit; their gradient is rounding.
        assert mask.sum() == 0 or found[parameter][mask].float().mean() > 0.9 or "k_proj.bias" in parameter, parameter
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_masks_on_gradients_are_found_out():
    """The released code's mask, by a name that no weight has; and a mask that is right, under AdamW's decay."""
    want = inside(models.build("gpt2"), "qkv")
    for fits, decay in ((lambda name: "c_attn.weights" in name, 0.0), (lambda name: True, 0.1)):
        model = models.build("gpt2")
        before = copied(model)
        trained = {n: p for n, p in model.named_parameters() if want[n].any()}
        for name, p in trained.items():
            p.requires_grad_(True)
            if fits(name) or name.endswith("bias"):
                p.register_hook(lambda grad, mask=want[name]: grad * mask)
        optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=decay)
        fit(model, batch, next_token_loss, budget=2, optimizers=[optimizer])
        found = moved(model, before)
        assert any((found[name] & ~want[name]).any() for name in trained)


def test_steps_are_those_of_the_slice_alone():
    """As a model that has nothing else: gradients of two batches add up, and a bfloat16 weight is rounded once."""
    weight = torch.nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16())
    model = torch.nn.Module()
    model.weight = weight
    start = weight.detach().clone()
    alone = torch.nn.Parameter(start[[1, 4]].float())
    optimizers = [torch.optim.AdamW([alone], lr=0.1, weight_decay=0.1)]
    with train_slices(model, [Slice(weight, 0, (1, 4))]) as own:
        optimizers.append(own.follow(torch.optim.AdamW(own.parameters, lr=0.1, weight_decay=0.1)))
        assert own.count == 10
        for _ in range(3):
            for factor in (1.0, 2.0):
                (factor * weight.float() ** 2).sum().backward()
                (factor * (alone.bfloat16().float() - alone.detach().bfloat16().float() + 1) * 0).sum()
            alone.grad = own.parameters[0].grad.clone()
            assert_close(own.parameters[0].grad, 6 * weight.detach()[[1, 4]].float(), 0.02)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    assert torch.equal(weight[[1, 4]], alone.bfloat16())
    assert torch.equal(weight[[0, 2, 3, 5]], start[[0, 2, 3, 5]]) and not torch.equal(weight[1], start[1])


def test_parts_are_where_the_head_is():
    """An output taken out is the head ablated; queries of zero are zero at that head and at no other."""
    ids = models.tokens(2, 9)
    model = models.build("llama")
    for parameter, dim, index in head_parts(model, HEADS, "o"):
        parameter.index_fill_(dim, torch.tensor(index), 0.0)
    with manyheads.use(models.tiny("llama"), "ablate:heads=" + "+".join(HEADS)), torch.no_grad():
        want = models.tiny("llama")(ids).logits
    with torch.no_grad():
        assert_close(model(ids).logits, want, SAME)
        assert is_far(models.tiny("llama")(ids).logits, want, SAME)

    class Queries(manyheads.strategy.AttentionWatch):
        def watch(self, call, out):
            call.state["q"], call.state["out"] = call.q, out

    for name in ("llama", "phi3"):
        model, seen = models.build(name), Queries()
        for parameter, dim, index in head_parts(model, ("0.1",), "q"):
            parameter.index_fill_(dim, torch.tensor(index), 0.0)
        with manyheads.use(model, seen) as port, torch.no_grad():
            model(ids)
        q = port.state(seen)[find_sites(model)[0][0].name]["q"]
        assert [bool((q[:, head] == 0).all()) for head in range(4)] == [False, True, False, False]


def test_what_cannot_be_tuned():
    model = models.tiny("llama")
    for heads, parts, says in (
        (("0.9",), "q", "has 4 heads"), (("7.0",), "q", "no layer 7"), (("x",), "q", "layer.head"),
        (("0.1",), "qx", "parts of a head"), (("0.1",), "", "parts of a head"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            head_parts(model, heads, parts)
    with pytest.raises(UserError, match="is not known"):
        head_parts(models.tiny("deepseek_v3"), ("0.1",), "q")
    weight = next(model.parameters())
    with pytest.raises(UserError, match="may overlap"):
        OwnSlices([Slice(weight, 0, (1,)), Slice(weight, 0, (2,))])
    with pytest.raises(UserError, match="no slices"), train_slices(model, []):
        pass


def test_the_recipe_saves_a_model_that_differs_there_alone(tmp_path, monkeypatch, capsys):
    lm, out = tiny.tiny(), tmp_path / "tuned"
    lm.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    known = [Profession("nurse", False, 0.0, -1.0)]
    monkeypatch.setattr(gender_bias, "professions", lambda: known)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The nurse said that on day {i} he left. " for i in range(4)))
    asked = ["--model", str(tmp_path / "model"), "--out", str(out), "--text", str(text), "--heads", "1.2",
             "--parts", "qo", "--budget", "2 steps", "--batch", "4", "--lr", "0.01"]  # fmt: skip
    assert main(asked) == 0 and "4 pairs of sentences; tuning 1.2" in capsys.readouterr().out
    made = load(out)[0]
    found = moved(made, copied(lm))
    assert {name for name, mask in found.items() if mask.any()} == {
        f"model.layers.1.self_attn.{part}_proj.weight" for part in "qo"
    }
    assert not found["model.layers.1.self_attn.q_proj.weight"][:32].any()
    assert main([*asked[:3], str(tmp_path / "other"), *asked[4:8], "--heads", "9.0"]) == 1
    with pytest.raises(SystemExit):
        main(asked)


def test_balanced_batches():
    """Every sentence stands beside its swap, each pair once an epoch; padding does not count."""

    class Letters:
        bos_token_id, eos_token_id = None, 0

        def encode(self, text, add_special_tokens=True):
            assert not add_special_tokens
            return [ord(letter) for letter in text]

    pairs = [(f"h{i}" + "x" * i, f"s{i}" + "x" * i) for i in range(6)]
    get_batch = balanced_batches(Letters(), pairs, 4, seed=1)
    seen = []
    for number in range(3):
        ids, counted = get_batch(number)
        rows = ["".join(map(chr, row[1 : 1 + int(c.sum())].tolist())) for row, c in zip(ids, counted, strict=True)]
        assert (ids[:, 0] == 0).all() and [row[0] for row in rows] == ["h", "s"] * 2
        assert all(h[1:] == s[1:] for h, s in zip(rows[::2], rows[1::2], strict=True))
        seen += rows
    assert sorted(seen) == sorted(text for pair in pairs for text in pair)
    assert not torch.equal(get_batch(0)[0], get_batch(3)[0])
    with pytest.raises(UserError, match="make no batch of 14"):
        balanced_batches(Letters(), pairs, 14, seed=0)
