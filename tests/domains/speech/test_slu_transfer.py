# SPDX-License-Identifier: Apache-2.0
"""slu_transfer: what is copied, what stands still, the sum of two losses, and the gate, against their formulas."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from manyheads.domains.speech import slu_transfer
from manyheads.domains.speech.slu_transfer import GatedFusion, SluTransfer
from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable, seeding
from manyheads.spec import parse
from manyheads.tasks._field_training import FieldTraining
from manyheads.tasks.speech.snips_requests import SnipsRequests
from manyheads.tasks.speech.spoken_commands import SpokenCommands
from manyheads.training.matching import parameters_of
from tiny.recordings import digits
from tolerance import PROJECTED, SAME, is_close, is_far

__all__ = ["digits"]

B, N, D, H = 3, 2, 8, 5


@pytest.fixture
def task(digits):
    return SpokenCommands(
        folder=str(digits), dim=16, layers=1, heads=2, batch=4, steps=3, rates=(3e-3,), commands=2, dropout=0.0
    )


def gradients(loss, model):
    model.zero_grad(set_to_none=True)
    loss().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def test_the_gate_is_its_formula():
    torch.manual_seed(0)
    fusion = GatedFusion(D, H, 4).double()
    s, h = torch.randn(B, N, D, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    out = fusion(s, h)
    for b in range(B):
        for n in range(N):
            u = fusion.text.weight @ h[b]
            both = torch.cat((s[b, n], u))
            gate = 1 / (1 + torch.exp(-(fusion.gate.weight @ both + fusion.gate.bias)))
            hidden = (fusion.hidden.weight @ torch.cat((s[b, n], gate * u)) + fusion.hidden.bias).clamp(min=0)
            assert is_close(out[b, n], fusion.out.weight @ hidden + fusion.out.bias, PROJECTED)
    assert is_far(fusion(s, h.flip(0)), out, PROJECTED)


def test_a_closed_gate_and_no_text_are_the_decoder_alone():
    torch.manual_seed(0)
    fusion = GatedFusion(D, H, 4).double()
    s, h = torch.randn(B, N, D, dtype=torch.float64), torch.randn(B, H, dtype=torch.float64)
    alone = fusion.out((s @ fusion.hidden.weight[:, :D].T + fusion.hidden.bias).relu())
    assert is_close(fusion(s), alone, PROJECTED) and is_close(fusion(s, torch.zeros_like(h)), alone, PROJECTED)
    assert is_far(fusion(s, h), alone, PROJECTED)
    with torch.no_grad():
        fusion.gate.bias.fill_(-1e9)
    assert is_close(fusion(s, h), alone, PROJECTED)


def test_two_losses_are_summed_by_their_weights(task):
    rng = np.random.default_rng(0)
    recipe, alone = SluTransfer(transfer="none", multitask=0.7), SluTransfer(transfer="none")
    torch.manual_seed(0)
    model = recipe.build(task, 16)
    batch = recipe.batches(task, rng, task.samples("train"))
    spoken = {name.removeprefix("spoken_"): x for name, x in batch.items() if name.startswith("spoken_")}
    both = gradients(lambda: recipe.loss(task, model, batch), model)
    first = gradients(lambda: alone.loss(task, model, batch), model)
    second = gradients(lambda: task.transcription_loss(model.encoder, model.transcriber, spoken), model)
    shared = [name for name in both if name.startswith("encoder.") and both[name] is not None]
    assert len(shared) > 10
    for name in shared:
        assert is_close(both[name], 0.7 * first[name] + 0.3 * second[name], SAME)
    assert any(is_far(both[name], 0.3 * first[name] + 0.7 * second[name], SAME) for name in shared)
    assert first["transcriber.weight"] is None and second["head.weight"] is None  # of one loss each


def fitted(task, recipe, seen):
    """Start a model; what was trained before is told to ``seen`` and changes the encoder by 1."""
    torch.manual_seed(0)
    model = recipe.build(task, 16)

    def fit(module, batches, loss, steps):
        batch = batches(np.random.default_rng(0))
        seen.append((steps, batch["targets"], float(loss(module, batch).detach())))
        with torch.no_grad():
            for p in module.parameters():
                p.add_(1.0)

    before = {name: x.clone() for name, x in model.state_dict().items()}
    recipe.start(task, model, fit)
    return before, model.state_dict()


@pytest.mark.parametrize("transfer", ["digits", "letters"])
def test_the_encoder_alone_is_transferred(task, transfer):
    seen = []
    before, after = fitted(task, SluTransfer(transfer=transfer, before=4), seen)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("encoder.") and name != "encoder.still"}
    ((steps, targets, loss),) = seen
    assert steps == 12 and np.isfinite(loss) and (int(targets.max()) > 10) == (transfer == "letters")
    before, after = fitted(task, SluTransfer(transfer="none"), seen)
    assert len(seen) == 1 and all(torch.equal(before[name], after[name]) for name in before)


def test_letters_are_of_other_speakers_than_the_commands(task, monkeypatch):
    samples = list(task.samples("train"))
    samples += [dataclasses.replace(sample, name=f"{sample.name}+", group="eve") for sample in samples]
    drawn, own = [], SpokenCommands.collate

    def collate(self, some):
        drawn.extend(sample.group for sample in some)
        return own(self, some)

    monkeypatch.setattr(SpokenCommands, "collate", collate)
    for letters, groups in ((True, {"eve"}), (False, {"ann", "eve"})):
        drawn.clear()
        for i in range(8):
            task.transcribed(np.random.default_rng(i), samples, letters)
        assert set(drawn) == groups
    drawn.clear()
    task.collate(task.draw(np.random.default_rng(0), samples))
    assert set(drawn) == {"ann"}


def test_an_encoder_stands_still_first_and_learns_more_slowly(task):
    def trained(**fields):
        recipe = SluTransfer(transfer="none", **fields)
        run = RunContext(Trainable(), (Arm("base"), Arm("own")), device=torch.device("cpu"))
        run.data["strategies"] = {"own": recipe}
        return FieldTraining(task, run, Arm("own")).train(0, 3e-3).model.state_dict()

    still, part, slow, free = (trained(**f) for f in ({"freeze": 1}, {"freeze": 0.5}, {"rate": 1e-3}, {}))
    key = "encoder.inside.layers.0.fc1.weight"
    moved = [float((one[key] - still[key]).norm()) for one in (part, slow, free)]
    assert moved[2] > moved[0] > 0 and 0 < moved[1] < 0.01 * moved[2]
    with torch.random.fork_rng():
        torch.manual_seed(seeding.number(0, weights=0))
        drawn = task.reference(still["decoder.layers.0.linear1.weight"].shape[0]).state_dict()
    assert torch.equal(still[key], drawn[key]) and is_far(still["head.weight"], drawn["head.weight"], SAME)


def test_texts_learn_nothing_and_are_not_needed_in_use(task, monkeypatch):
    recipe = SluTransfer(transfer="none", fusion=True)
    vectors = torch.randn(task.batch, task.text)
    monkeypatch.setattr(SpokenCommands, "described", lambda self, samples: vectors[: len(samples)])
    torch.manual_seed(0)
    model = recipe.build(task, 16)
    batch = recipe.batches(task, np.random.default_rng(0), task.samples("train"))
    assert torch.equal(batch["text"], vectors) and not vectors.requires_grad
    losses = {round(float(recipe.loss(task, model, batch)), 6) for _ in range(12)}
    assert len(losses) > 3  # texts are left out at random
    plain = task.predict(model.eval(), {k: x for k, x in batch.items() if k != "text"})
    assert list(map(str, recipe.predict(task, model, batch))) == list(map(str, plain))


@pytest.mark.parametrize("kind", ["spoken", "written"])
def test_published_weights_are_the_encoders_to_the_bit(kind, monkeypatch):
    """Of random models of the published kinds, of which the task takes one layer of two."""
    from transformers import BertConfig, BertModel, WhisperConfig, WhisperModel

    import manyheads.models as models

    if kind == "spoken":
        found = WhisperModel(
            WhisperConfig(
                d_model=16,
                encoder_layers=2,
                encoder_attention_heads=2,
                encoder_ffn_dim=64,
                decoder_layers=1,
                decoder_attention_heads=2,
            )
        )
        task = SpokenCommands(dim=16, layers=1, heads=2)
        monkeypatch.setattr(models, "load_speech", lambda *_: (found, None, None))
        theirs, model = found.get_encoder(), task.reference(16)
    else:
        found = BertModel(
            BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        )
        monkeypatch.setattr(models, "load_reader", lambda *_: (found, None))
        monkeypatch.setattr("manyheads.tasks.speech.snips_requests._tokenizer", lambda name: range(50))
        monkeypatch.setattr(SnipsRequests, "samples", lambda self, part: ())
        monkeypatch.setattr("manyheads.tasks.speech.snips_requests.labels", lambda samples: (["a"], ["O"]))
        task = SnipsRequests(dim=16, layers=1, heads=2)
        theirs, model = found, task.reference(16)
    size = parameters_of(model)
    recipe = SluTransfer(transfer="published")
    own, want = model.encoder.inside.state_dict(), theirs.state_dict()
    assert any(not torch.equal(x, want[name]) for name, x in own.items())
    recipe.start(task, model, partial(pytest.fail, "nothing is trained before"))
    assert all(torch.equal(x, want[name]) for name, x in model.encoder.inside.state_dict().items())
    assert parameters_of(model) == size  # as many as from scratch
    with pytest.raises(UserError, match="another shape"):
        recipe.start(type(task)(dim=16, layers=3, heads=2), model, None)


@pytest.mark.parametrize("fields", ["multitask=0.5", "fusion=true", "transfer=letters"])
def test_writing_has_no_transcripts(fields, monkeypatch):
    monkeypatch.setattr("manyheads.tasks.speech.snips_requests._tokenizer", lambda name: range(50))
    monkeypatch.setattr(SnipsRequests, "samples", lambda self, part: ())
    monkeypatch.setattr("manyheads.tasks.speech.snips_requests.labels", lambda samples: (["a"], ["O"]))
    task, recipe = SnipsRequests(dim=16, layers=1, heads=2), parse(f"slu_transfer:{fields}")
    with pytest.raises(UserError, match="no recordings"):
        recipe.start(task, recipe.build(task, 16), None)


@pytest.mark.parametrize("spec", ["multitask=0", "freeze=2", "rate=0", "transfer=mandarin", "before=0"])
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="slu_transfer"):
        parse(f"slu_transfer:{spec}")
    assert slu_transfer.SluTransfer().transfer == "digits"
