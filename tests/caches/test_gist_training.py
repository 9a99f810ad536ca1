# SPDX-License-Identifier: Apache-2.0
"""Training of gists: the two losses from their formulas, what moves and what does not, what is saved."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import manyheads
from manyheads import UserError
from manyheads.caches.gist import Gists, Segments
from manyheads.caches.gist.losses import WeakDecoder, context_weights, importance
from manyheads.caches.gist.one_pass import GistPass
from manyheads.recipes.gist import main, new_gists, train_gists
from oracles import models
from tolerance import CLOSE, FORMULA, assert_close, error, is_far, nearly

SEGMENTS = Segments(length=8, ratio=2)


def test_importance():
    """Softmax of the nats that context saves, capped; uniform where nothing is saved, or nothing counts."""
    full, own = torch.rand(2, 2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 4
    own.requires_grad_()
    found = importance(full, own, 1.0)
    want = [
        [math.exp(min(b - a, 1.0)) for a, b in zip(x, y, strict=True)]
        for x, y in zip(full.tolist(), own.tolist(), strict=True)
    ]
    assert_close(found, [[x / sum(row) for x in row] for row in want], FORMULA)
    assert found.sum(1).tolist() == nearly([1.0, 1.0]) and not found.requires_grad
    for even in (importance(full, full, 1.0), importance(full, own, -1e9)):
        assert_close(even, torch.full_like(even, 1 / 7), FORMULA)
    assert is_far(importance(own, full, 1.0), found, FORMULA)  # the printed fraction upside down


def test_context_weights():
    """Of the first segment no token needs more context; of later ones what their segment cannot say counts more."""
    llama, ids = models.tiny("llama", torch.float64), models.tokens(2, 17)

    def logits(x):
        return llama(x, use_cache=False).logits

    found = context_weights(logits, ids, 8, 2.0)
    with torch.no_grad():
        full = torch.nn.functional.cross_entropy(logits(ids[:, :-1]).mT, ids[:, 1:], reduction="none")
        own = torch.nn.functional.cross_entropy(logits(ids[:, 8:-1]).mT, ids[:, 9:], reduction="none")
    assert_close(found, importance(full, torch.cat([full[:, :8], own], 1), 2.0), CLOSE)
    assert is_far(found, torch.full_like(found, 1 / 16), CLOSE)
    with pytest.raises(UserError, match="multiple of 8"):
        context_weights(logits, ids[:, :-1], 8, 2.0)


def test_weak_decoder():
    """Each token from the gist and those before it; with gists that say their token the loss goes to nothing."""
    torch.manual_seed(0)
    decoder = WeakDecoder(16, 2, 1, 8, 2, 4)
    keys, values = ({i: torch.randn(3, 1, 1, 8) for i in range(2)} for _ in range(2))
    x = torch.randn(3, 4, 16, requires_grad=True)
    out = decoder(keys, values, x)
    out[:, 2].sum().backward()
    assert (x.grad.abs().sum((0, 2)) > 0).tolist() == [True, True, False, False]  # [ae], x_1, x_2 predict the third
    assert is_far(decoder(keys, {i: 2 * v for i, v in values.items()}, x), out, CLOSE)

    table, ids = torch.nn.Embedding(12, 16), torch.randint(12, (2, 24))
    decoder = WeakDecoder(16, 2, 1, 8, 1, 1)
    said = {0: table(ids)[:, None, :, :8].detach()}
    optimizer = torch.optim.Adam([*decoder.parameters(), *table.parameters()], lr=0.02)
    losses = []
    for _ in range(60):
        loss, back = decoder.loss({0: torch.zeros_like(said[0])}, said, ids, table, lambda h: h @ table.weight.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 1.5 and losses[-1] < 0.1 and float(back) == 1.0


def batch_of(length=16, rows=4):
    text = torch.arange(200) * 7 % 23

    def get_batch(number):
        starts = torch.randint(len(text) - length, (rows, 1), generator=torch.Generator().manual_seed(number))
        return text[starts + torch.arange(length + 1)]

    return get_batch


def test_training_moves_gists_alone(tmp_path):
    """The model stays to the bit, every part of the gists moves, the loss falls, and what is saved is what was made."""
    model = models.build("llama").requires_grad_(True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    told = []
    gists = train_gists(
        model, batch_of(), segments=SEGMENTS, ae=0.5, tie=True, budget=15, lr=0.02, lora=2,
        on_step=lambda state, figures: told.append(figures),
    )  # fmt: skip
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    fresh = new_gists(model, SEGMENTS, lora=2).state_dict()
    still = [name for name, x in gists.state_dict().items() if torch.equal(x, fresh[name])]
    assert still == ["projections.model|layers|1|self_attn|q_proj"]  # nothing reads what the last layer gives of gists
    assert told[-1]["text"] < told[0]["text"] - 0.1 and told[-1]["ae"] < told[0]["ae"]
    assert set(told[0]) == {"text", "ae", "back"} and gists.about["steps"] == 15
    strategy = manyheads.parse(f"gist:gists={gists.save(tmp_path)}")
    again = Gists.load(tmp_path)
    for name, x in gists.state_dict().items():
        assert torch.equal(again.state_dict()[name], x.bfloat16().float())
    ids = models.tokens(1, 20)
    with manyheads.use(model, strategy), torch.no_grad():
        got = model(ids).logits
    with manyheads.use(model, GistPass(trained=again)), torch.no_grad():
        assert_close(got, model(ids, use_cache=False).logits)


def test_each_loss_counts():
    """Without one of the losses, without LoRA, or with the model's own projections, other gists come out."""
    model, made = models.tiny("llama"), []
    for more in ({}, {"ae": 0.5}, {"tie": True}, {"lora": 0}, {"own": ()}):
        gists = train_gists(model, batch_of(), segments=SEGMENTS, budget=3, **{"lora": 2, "lr": 0.02, **more})
        made.append(gists.embedding.clone())
    assert all(error(other, made[0]) > 1e-5 for other in made[1:])
    assert not gists.projections and gists.up


def test_a_model_in_bfloat16():
    """Gists stay in float32 beside it, and both losses go through."""
    model = models.build("llama", dtype=torch.bfloat16)
    gists = train_gists(model, batch_of(), segments=SEGMENTS, ae=0.5, tie=True, budget=2, lora=2)
    assert {p.dtype for p in gists.parameters()} == {torch.float32} and gists.about["text"] < 10
    assert gists.projections["model|layers|0|self_attn|v_proj"].abs().sum() > 0


class Waits(TorchDispatchMode):
    """Collects operations for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func == torch.ops.aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if masks or any(name in str(func) for name in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing(monkeypatch):
    """So that steps can be recorded as a CUDA graph."""
    model, found = models.tiny("llama"), []

    def once(trained, get_batch, loss, **_):
        with Waits() as waits:
            loss(trained, get_batch(0)).backward()
        found.append(waits.found)

    monkeypatch.setattr("manyheads.recipes.gist.fit", once)
    train_gists(model, batch_of(), segments=SEGMENTS, ae=0.5, tie=True, lora=2)
    assert found == [[]]
    with Waits() as waits, manyheads.use(model):  # as the model itself asks whether texts are packed
        model(batch_of()(0), use_cache=False)
    assert waits.found


def test_recipe(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    out = tmp_path / "gists"
    given = ["--text", str(text), "--segment", "16", "--length", "32", "--batch", "1", "--budget", "2 steps"]
    assert main(["--out", str(out), *given, "--coarse", "--ae", "1", "--tie"]) == 0
    assert f"gist:gists={out}" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["gists.json", "gists.safetensors"]
    found = Gists.load(out)
    assert found.segments == Segments(length=16, ratio=4, granularity="coarse") and len(found.embedding) == 4
    with pytest.raises(SystemExit):
        main(["--out", str(out)])
    assert main(["--out", str(tmp_path / "b"), *given, "--ratio", "3"]) == 1
