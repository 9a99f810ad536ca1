# SPDX-License-Identifier: Apache-2.0
"""What `inspect` says of images and recordings is what the weights of an eager model say; places are where they are."""

import math
import wave

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from manyheads.data.audio import read_wave, resampled
from manyheads.errors import UserError
from manyheads.inspect.signal_breakdown import CLASS, RECEIVED
from manyheads.inspect.signal_run import inspect_signals
from manyheads.inspect.signals import read_audio, read_images
from tolerance import is_close, is_far

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": [32, 48],
    "initializer_range": 0.3,
}  # fmt: skip
VISION = {
    "ViT": {"intermediate_size": 64}, "Dinov2": {"mlp_ratio": 2},
    "Dinov2WithRegisters": {"mlp_ratio": 2, "num_register_tokens": 2},
    "Yolos": {"intermediate_size": 64, "num_detection_tokens": 5},  # tokens behind the patches
    "Aimv2Vision": {"intermediate_size": 64},  # a class token that only its head has
}  # fmt: skip
SPEECH = {
    "vocab_size": 600, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 50, "max_target_positions": 12, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0, "init_std": 0.3,
}  # fmt: skip


def vision(name):
    torch.manual_seed(0)
    sizes = SIZES if name in ("ViT", "Yolos") else {**SIZES, "image_size": 48}  # the others stretch their positions
    if name == "Aimv2Vision":
        sizes = {**SIZES, "image_size": 32}
    config = getattr(transformers, f"{name}Config")(**sizes, **VISION[name])
    return getattr(transformers, f"{name}Model")(config).eval()


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def record(path, seconds, rate=16000, width=2, channels=1):
    """A chirp as a WAV file; its samples."""
    t = np.arange(int(seconds * rate)) / rate
    sound = 0.5 * np.sin(2 * np.pi * (300 + 400 * t) * t)
    whole = np.round(np.repeat(sound[:, None], channels, 1) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    whole = whole + 128 if width == 1 else whole
    raw = whole.reshape(-1, 1).astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return sound


@pytest.fixture(scope="module")
def speech():
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SPEECH)).eval()
    return model, transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)


@pytest.mark.parametrize("name", VISION)
def test_an_image_against_dense_maps(name, picture):
    model = vision(name)
    columns = 4 if name == "Aimv2Vision" else 6  # whose positions are of squares
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 8 * columns})
    (signal,) = read_images([picture], model, processor)
    seen = inspect_signals(model, [signal], ["sinks"])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.cat(model(**signal.values, output_attentions=True).attentions).double()  # [L, H, T, T]
    before = {"Dinov2WithRegisters": 3, "Aimv2Vision": 0}.get(name, 1)
    patches, behind = 4 * columns, 5 if name == "Yolos" else 0
    size = before + patches + behind
    assert signal.grid == (4, columns) and maps.shape[-1] == size == len(signal.labels) == len(signal.ids)
    assert signal.labels[before + columns + 1] == "row 1, column 1"
    assert signal.labels[:1] == (["class token"] if before else ["row 0, column 0"])
    assert signal.labels[size - behind :] == [f"detection token {i}" for i in range(behind)]
    own = seen.found["attention"]
    want = {"itself": maps.diagonal(dim1=2, dim2=3).clone()}
    if before:
        want["class token"] = maps[..., 0].clone()
        want["class token"][..., 0] = 0  # that is itself
    around = torch.zeros(size, size)
    for a in range(patches):
        for b in range(patches):
            (r, c), (s, d) = divmod(a, columns), divmod(b, columns)
            around[before + a, before + b] = a != b and abs(r - s) <= 1 and abs(c - d) <= 1
    want["the patches around it"] = (maps * around).sum(-1)
    if before > 1:
        alone = (torch.arange(size) > 0) & (torch.arange(size) < before)  # a register's weight on itself
        want["registers"] = maps[..., 1:before].sum(-1) - want["itself"] * alone
    if behind:
        alone = torch.arange(size) >= size - behind
        want["detection tokens"] = maps[..., size - behind :].sum(-1) - want["itself"] * alone
    for part, mass in want.items():
        assert is_close(own.tables[part].mean, mass.mean(-1)), part
    assert is_close(sum(own.tables[part].mean for part in seen.parts), 1)
    assert is_close(own.series[RECEIVED][0], maps.mean((0, 1, 2)) * size)
    if before:
        given = maps[-1, 2, 0] * size
        assert is_close(own.series[f"{CLASS}, head 1.2"][0], given)
        assert is_far(given, maps[-1, 2, :, 0] * size)  # what it is given is not what it gives
    else:
        assert not any(name.startswith(CLASS) for name in own.series)
    if columns == 6:
        wrong = torch.zeros(size, size)  # neighbours if columns were counted first
        order, inside = torch.arange(24).reshape(4, 6).T.flatten(), slice(before, before + 24)
        wrong[inside, inside] = around[inside, inside][order][:, order]
        assert is_far((maps * wrong).sum(-1).mean(-1), want["the patches around it"].mean(-1))
    wrong = torch.zeros(size, size)  # neighbours one patch off, as where a token before them is not counted
    wrong[1:, 1:] = around[:-1, :-1]
    assert is_far((maps * wrong).sum(-1).mean(-1), want["the patches around it"].mean(-1))
    best = int(maps.mean((0, 1, 2)).argmax())
    assert signal.labels[best] in own.notes[0] and own.records.popitem()[1][0]["column"] == best
    assert set(seen.tokens[0]) == set(signal.labels) and math.isnan(seen.loss) and not seen.others


def test_an_image_is_prepared_as_the_processor_says(picture):
    model = vision("ViT")
    processor = transformers.ViTImageProcessorPil(size={"height": 32, "width": 48}, image_mean=[0.5] * 3)
    (signal,) = read_images([picture], model, processor)
    want = np.asarray(Image.open(picture).resize((48, 32), 2))
    assert np.abs(signal.picture.astype(int) - want).max() <= 1 and signal.picture.shape == (32, 48, 3)
    (plain,) = read_images([picture], model)
    assert is_far(plain.values["pixel_values"], signal.values["pixel_values"])
    assert np.abs(plain.picture.astype(int) - np.asarray(Image.open(picture).resize((48, 32), 3))).max() <= 1


def test_models_without_a_map_are_refused(picture, tmp_path):
    torch.manual_seed(0)
    masked = transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES | {"image_size": 32})).eval()
    with pytest.raises(UserError, match="masks, merges or windows"):
        inspect_signals(masked, read_images([picture], masked), ["sinks"])
    model = vision("ViT")
    signals = read_images([picture], model)
    for lens, word in (("spans", "looks at parts of a text"), ("rhythm", "no attention to look at")):
        with pytest.raises(UserError, match=word):
            inspect_signals(model, signals, [lens])
    wrong = transformers.ViTImageProcessorPil(size={"height": 40, "width": 40})
    with pytest.raises(UserError, match="takes no such image"):
        inspect_signals(model, read_images([picture], model, wrong), ["sinks"])
    with pytest.raises(UserError, match="there are 0 to 1"):
        inspect_signals(model, signals, layers=[7])
    one = inspect_signals(model, signals, ["sinks"], layers=[1])
    assert one.found["active_dormant"].tables["sink"].layers == (1,)
    (tmp_path / "no.png").write_text("no image")
    for path, word in ((tmp_path / "no.png", "no image that can be read"), (tmp_path / "x.png", "no such file")):
        with pytest.raises(UserError, match=word):
            read_images([path], model)


def test_a_recording_against_dense_maps(speech, tokenizer, tmp_path):
    model, extractor = speech
    record(tmp_path / "a.wav", 0.6)
    (signal,) = read_audio([tmp_path / "a.wav"], model, extractor, tokenizer)
    assert (signal.frames, signal.heard, signal.step) == (50, 30, 0.02) and signal.ids[0] == 0
    seen = inspect_signals(model, [signal])
    eager = transformers.WhisperForConditionalGeneration(model.config).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    ids = torch.tensor([signal.ids])
    with torch.no_grad():
        out = eager(input_features=signal.values["input_features"], decoder_input_ids=ids, output_attentions=True)
    cross, encoder, decoder = (
        torch.cat(x).double() for x in (out.cross_attentions, out.encoder_attentions, out.decoder_attentions)
    )
    assert set(seen.others) == {"cross", "encoder"} and "reasoning_rhythm" in seen.found
    own = seen.others["cross"].found["attention"]
    assert is_close(own.tables["the recording"].mean, cross[..., :30].sum(-1).mean(-1))
    assert is_far(own.tables["the recording"].mean, cross[..., :31].sum(-1).mean(-1))
    assert is_close(own.alignments[0], cross.mean((0, 1))) and own.alignments[0].shape == (
        len(ids[0]),
        50,
    )
    frame = torch.arange(50)
    near = ((frame[:, None] - frame).abs() <= 10) & (frame < 30) & (frame[:, None] != frame)
    own = seen.others["encoder"].found["attention"]
    assert is_close(own.tables["0.2 s around it"].mean, (encoder * near).sum(-1).mean(-1))
    assert is_far(own.tables["0.2 s around it"].mean, (encoder * near.triu()).sum(-1).mean(-1))
    sink = seen.found["active_dormant"].tables["sink"]
    assert is_close(sink.mean, decoder[:, :, 1:, 0].mean(-1)) and sink.layers == (0, 1)
    loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], ids[0, 1:])
    assert seen.loss == pytest.approx(float(loss), abs=1e-5)
    assert seen.others["encoder"].tokens[0][3] == "0.06 s" and len(seen.tokens[0]) == len(ids[0])


def test_wav_files(speech, tokenizer, tmp_path):
    for width, error in ((1, 1e-2), (2, 1e-4), (3, 1e-6), (4, 1e-8)):
        sound = record(tmp_path / "a.wav", 0.3, 8000, width, 2)
        got, rate = read_wave(tmp_path / "a.wav")
        assert rate == 8000 and np.abs(got - sound).max() < error
    up = resampled(sound, 8000, 16000)
    want = record(tmp_path / "b.wav", 0.3, 16000)
    middle = slice(400, -400)
    assert np.abs(up - want)[middle].max() < 5e-3 < np.abs(np.repeat(sound, 2) - want)[middle].max()
    model, extractor = speech
    record(tmp_path / "long.wav", 1.5)
    record(tmp_path / "none.wav", 0)
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    for name, word in (("long", "1.5 s, and the model hears 1 s"), ("none", "give a recording"), ("x", "no WAV file"),
                       ("missing", "no such file")):  # fmt: skip
        with pytest.raises(UserError, match=word):
            read_audio([tmp_path / f"{name}.wav"], model, extractor, tokenizer)
