# SPDX-License-Identifier: Apache-2.0
"""Fusions against their formulas in float64, and what one becomes of another; each with a wrong variant."""

import math

import numpy as np
import pytest
import torch

from manyheads.attention.positions import interleaved_sinusoids
from manyheads.data import files
from manyheads.data.labelled import labelled
from manyheads.domains.speech import silero_vad
from manyheads.domains.speech.fusion_vad import Addition, Concatenation, CrossAttention, FusionVad
from manyheads.domains.speech.silero_vad import SileroVad
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.tasks.speech._cepstra import COEFFICIENTS
from manyheads.tasks.speech._mixtures import stream
from manyheads.tasks.speech.voice_activity import VadModel, VoiceActivity
from tolerance import DEEP, PROJECTED, SAME, error, is_close, is_far

B, T, D, H, STATES = 2, 12, 16, 2, 384
MASK = torch.ones(B, T, dtype=torch.bool)
MASK[1, 7:] = False


class Task:
    """As much of a task as the recipe asks for."""

    dim, layers, heads, dropout = D, 2, H, 0.0

    def around(self, blocks, size=0, width=0):
        return VadModel(blocks[0], size, D, STATES, width, 2, 0.0)


def built(seed=0, **fields):
    torch.manual_seed(seed)
    return FusionVad(**fields).build(Task(), 8).double().eval()


@pytest.fixture
def batch():
    return torch.randn(B, T, COEFFICIENTS, dtype=torch.float64), torch.randn(B, T, STATES, dtype=torch.float64), MASK


def copied(target, source, before):
    """``source``'s weights in ``target``, the first layer behind the fusion as ``before``."""
    state = source.state_dict()
    state["before.0.weight"] = before
    target.load_state_dict(state, strict=False)
    return target


def test_a_concatenation_with_tied_weights_is_an_addition(batch):
    added = built()
    weight = added.before[0].weight
    tied = copied(built(1, fusion="concat"), added, torch.cat((weight, weight), 1))
    assert is_close(tied(*batch)[MASK], added(*batch)[MASK], DEEP)
    untied = copied(built(1, fusion="concat"), added, torch.cat((weight, -weight), 1))
    assert is_far(untied(*batch)[MASK], added(*batch)[MASK], DEEP)


@pytest.mark.parametrize("fusion", ["addition", "concat"])
@pytest.mark.parametrize("left", ["mfcc", "whisper"])
def test_a_fusion_that_ignores_a_stream_is_the_other_alone(batch, fusion, left):
    alone = _tiny().reference(8, "whisper" if left == "mfcc" else "mfcc").double().eval()
    weight = alone.before[0].weight
    zero = torch.zeros_like(weight)
    whole = weight if fusion == "addition" else torch.cat((zero, weight) if left == "mfcc" else (weight, zero), 1)
    both = copied(built(1, fusion=fusion), alone, whole)
    if fusion == "addition":
        assert is_far(both(*batch)[MASK], alone(*batch)[MASK], DEEP)  # control: the stream is there
        with torch.no_grad():
            getattr(both, left).weight.zero_()
            getattr(both, left).bias.zero_()
    assert is_close(both(*batch)[MASK], alone(*batch)[MASK], DEEP)


def _tiny():
    return VoiceActivity(dim=D, layers=2, heads=H, dropout=0.0)


@pytest.mark.parametrize("query", ["whisper", "mfcc"])
@pytest.mark.parametrize("positions", [True, False])
def test_cross_attention_is_its_formula(query, positions):
    fusion = CrossAttention(D, H, query, positions).double().eval()
    m, p = torch.randn(B, T, D, dtype=torch.float64), torch.randn(B, T, D, dtype=torch.float64)
    angle = [[t / 10_000 ** (2 * (k // 2) / D) for k in range(D)] for t in range(T)]
    places = torch.tensor([[(math.cos if k % 2 else math.sin)(a) for k, a in enumerate(row)] for row in angle])
    assert error(interleaved_sinusoids(torch.arange(T), D), places) < 1e-6
    places = interleaved_sinusoids(torch.arange(T), D).double() * positions
    x, y = (p + places, m + places) if query == "whisper" else (m + places, p + places)
    a = fusion.attention
    wq, wk, wv = a.in_proj_weight.chunk(3)
    bq, bk, bv = a.in_proj_bias.chunk(3)
    q, k, v, want = x @ wq.T + bq, y @ wk.T + bk, y @ wv.T + bv, torch.zeros_like(m)
    for b in range(B):
        for head in range(H):
            part = slice(head * D // H, (head + 1) * D // H)
            for t in range(T):
                scores = torch.stack([q[b, t, part] @ k[b, s, part] for s in range(T) if MASK[b, s]])
                want[b, t, part] = (scores / math.sqrt(D / H)).softmax(0) @ v[b, MASK[b], part]
    assert is_close(fusion(m, p, MASK), a.out_proj(want), PROJECTED)
    other = CrossAttention(D, H, "mfcc" if query == "whisper" else "whisper", positions).double().eval()
    other.load_state_dict(fusion.state_dict())
    assert is_far(other(m, p, MASK), a.out_proj(want), PROJECTED)


def test_frames_that_are_alike_give_every_query_the_same_answer():
    fusion = CrossAttention(D, H, "whisper", False).double().eval()
    m, p = torch.randn(1, 1, D, dtype=torch.float64).expand(1, T, D), torch.randn(1, T, D, dtype=torch.float64)
    out = fusion(m, p, MASK[:1])
    assert is_close(out, out[:, :1].expand_as(out), PROJECTED)
    with_places = CrossAttention(D, H, "whisper", True).double().eval()
    with_places.load_state_dict(fusion.state_dict())
    out = with_places(m, p, MASK[:1])
    assert is_far(out, out[:, :1].expand_as(out), PROJECTED)


def test_additions_and_concatenations_are_what_they_say():
    m, p = torch.randn(B, T, D), torch.randn(B, T, D)
    assert torch.equal(Addition()(m, p, MASK), m + p)
    assert torch.equal(Concatenation()(m, p, MASK), torch.stack((m, p), 2).flatten(2))


@pytest.mark.parametrize("fusion", ["addition", "concat", "cross"])
def test_padding_reaches_no_frame(batch, fusion):
    model, (cepstra, states, mask) = built(fusion=fusion), batch
    alone = model(cepstra[1:, :7], states[1:, :7], mask[1:, :7])
    filled = [torch.where(mask[..., None], x, 1e3) for x in (cepstra, states)]
    assert is_close(model(*filled, mask)[1:, :7], alone, DEEP)
    assert is_far(model(*filled, torch.ones_like(mask))[1:, :7], alone, DEEP)  # the LSTM reads backwards too


def test_dropout_is_between_the_layers_of_the_lstm():
    for layers, want in ((1, 0.0), (2, 0.4)):
        task = VoiceActivity(dim=D, layers=layers, heads=H, dropout=0.4)
        assert task.reference(8).recurrent.dropout == want


def test_padding_is_no_part_of_the_loss(batch):
    model, (cepstra, states, mask) = built(), batch
    given = {"inputs": cepstra, "states": states, "mask": mask, "targets": (torch.rand(B, T) < 0.5).double()}
    said, right = model(*batch).float().sigmoid()[mask], given["targets"][mask].bool()
    want = -torch.where(right, said, 1 - said).log().mean()
    assert error(_tiny().loss(model, given), want) <= SAME
    filled = {**given, "targets": torch.where(mask, given["targets"], 1 - given["targets"])}
    assert torch.equal(_tiny().loss(model, filled), _tiny().loss(model, given))


def test_what_cross_attention_looks_at_is_shown(batch):
    cepstra, states, mask = batch
    given = {"inputs": cepstra, "states": states, "mask": mask}
    short = {name: x[1:] for name, x in given.items()}
    (one,) = FusionVad(fusion="cross").pictures(built(fusion="cross"), short)
    assert (len(one.values), one.rows, one.columns) == (2, ["0.00", "0.08"], ["0.00"])  # no frame of padding asks
    (picture,) = FusionVad(fusion="cross").pictures(built(fusion="cross"), given)
    assert picture.rows == picture.columns == ["0.00", "0.08", "0.16"]
    assert all(abs(sum(row) - 1) < 1e-6 for row in picture.values)
    assert FusionVad().pictures(built(), given) == ()


def test_bfloat16_runs(batch):
    cepstra, states, mask = (x.float() if x.is_floating_point() else x for x in batch)
    model = built(fusion="cross").float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(cepstra, states, mask)
    assert out.isfinite().all() and error(out[mask], model(cepstra, states, mask)[mask]) < 0.1


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="fusion_vad"):
        parse("fusion_vad:fusion=product")
    assert parse("fusion_vad:fusion=cross,query=mfcc").query == "mfcc"


def test_a_frame_has_the_probability_of_the_chunk_that_holds_its_middle(monkeypatch):
    heard = []

    class Numbered:
        """A detector that says of each chunk its number."""

        def audio_forward(self, sound, sr):
            heard.append(sound[0])
            return torch.arange(-(-sound.shape[1] // 256), dtype=torch.float32)[None]

    monkeypatch.setattr(silero_vad, "_model", Numbered)
    sound = torch.randn(1700)
    want = [(160 * i + 80) // 256 for i in range(10)]
    assert SileroVad().speech(sound).tolist() == SileroVad().speech(9 * sound).tolist() == want
    assert want != [160 * i // 256 for i in range(10)]  # of its beginning
    assert error(heard[0], heard[1]) < 1e-6 and heard[0].abs().max() == pytest.approx(0.5)


def test_the_published_detector_tells_words_from_silence():
    pytest.importorskip("silero_vad", reason="needs silero-vad")
    silent = SileroVad().speech(0.001 * torch.randn(16_000))
    assert silent.shape == (100,) and silent.max() < 0.5
    if files.local("fsdd") is None:
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    words = [item.values[:, 0] for item in labelled("fsdd").items if item.group == "theo"][:8]
    sound, labels = stream(np.random.default_rng(0), words, 200)
    said = SileroVad().speech(torch.from_numpy(sound).float()).numpy()
    assert said[labels].mean() > 0.7 and said[~labels].mean() < said[labels].mean() - 0.3
    late = np.roll(said, 10)  # control: 0.2 s out of step
    assert late[labels].mean() - late[~labels].mean() < said[labels].mean() - said[~labels].mean()
