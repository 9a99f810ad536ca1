# SPDX-License-Identifier: Apache-2.0
"""The verb `generate` as it is typed: what is in the picture is what the pipeline makes, and errors are a line."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import manyheads
from manyheads.errors import UserError
from manyheads.generate.run import arm
from manyheads.models.scenes import load_scenes
from manyheads.report import grids as grid
from tiny import pipelines
from tolerance import nearly

folders, scenes, cli = pipelines.folders, pipelines.scenes, pipelines.cli

STEPS = ["--steps", "3"]
PROMPT = "apple top left ship"


def places(page, column, picture):
    """Heights at which a picture stands in a column of a labelled grid, enlarged five times."""
    x = 190 + column * 168
    seen, big = np.asarray(page)[:, x : x + 160], picture.repeat(5, 0).repeat(5, 1)
    return [y for y in range(len(seen) - 159) if np.array_equal(seen[y : y + 160], big)]


def made(pipe, prompt, *strategies, seed=0):
    with manyheads.use(pipe, *strategies):
        return pipe(
            prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(seed), output_type="np"
        ).images[0]  # fmt: skip


def levels(x):
    return (x * 255).round().astype(np.uint8)


def test_the_picture_holds_what_the_pipeline_makes(cli, folders, scenes, tmp_path):
    spec = "headhunter:heads=1.1,scale=2"
    code, out, err = cli(
        "generate",
        "--model",
        str(folders["scenes"]),
        "--strategy",
        spec,
        "--prompt",
        PROMPT,
        *STEPS,
        "--out",
        "a/b.png",
    )
    assert code == 0 and "baseline" in err and "a/b.png" in out and spec in out, err
    page = Image.open(tmp_path / "a" / "b.png")
    plain, steered = made(scenes, PROMPT), made(scenes, PROMPT, spec)
    (y,) = places(page, 0, levels(plain))
    assert places(page, 1, levels(steered)) == [y]
    assert not places(page, 0, levels(made(scenes, PROMPT, seed=1)))  # the check can fail
    assert not places(page, 1, levels(plain))
    apart = np.abs(plain - steered).mean(-1)
    seen = np.asarray(page)[y : y + 160 : 5, 526:686:5].astype(int).sum(-1)
    assert seen[np.unravel_index(apart.argmax(), apart.shape)] == seen.max() > seen.min()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.png"]


def test_figures(cli, folders, scenes):
    spec = "headhunter:heads=1.1,scale=2"
    code, out, err = cli(
        "generate", "--model", str(folders["scenes"]), "--strategy", spec, "--strategy", "pab + " + spec, "--prompt",
        PROMPT, "--seeds", "0,4", *STEPS, "--json",
    )  # fmt: skip
    facts = json.loads(out)
    assert code == 0 and err == "" and [row["seed"] for row in facts["rows"]] == [0, 4]
    base, one, both = facts["arms"]
    pairs = [(made(scenes, PROMPT, seed=s), made(scenes, PROMPT, spec, seed=s)) for s in (0, 4)]
    assert one["mean_difference"] == nearly(np.mean([np.abs(a - b).mean() for a, b in pairs]))
    error = np.mean([np.square(a - b).mean() for a, b in pairs])
    assert one["psnr"] == pytest.approx(10 * np.log10(1 / error), abs=1e-3)
    # two pictures, three steps, both branches; headhunter's own pass has one row
    assert (base["denoiser_calls"], base["denoiser_rows"]) == (6, 12)
    assert (one["denoiser_calls"], one["denoiser_rows"]) == (12, 18)
    assert base["psnr"] is None and base["kept_bytes"] is None and both["kept_bytes"] > 0
    assert both["strategies"] == ["pab", "headhunter:heads=1.1,scale=2.0"] and facts["environment"]["diffusers"]


def test_a_strategy_that_changes_nothing_is_told(cli, folders):
    code, out, _ = cli(
        "generate", "--model", str(folders["scenes"]), "--strategy", "pab:spatial=1,cross=1,temporal=1", *STEPS,
        "--prompt", PROMPT,
    )  # fmt: skip
    assert code == 0 and "changed nothing" in out


def test_a_pair_starts_from_the_same_noise(cli, folders, tmp_path):
    pipe, spec, source = load_scenes(folders["unet"]), "masactrl:start_step=1,start_layer=0", "ghost top left ship"
    code, _, err = cli(
        "generate", "--model", str(folders["unet"]), "--strategy", spec, "--source", source, "--prompt", PROMPT, *STEPS
    )
    assert code == 0, err
    noise = pipe.noise(1, torch.Generator().manual_seed(0))
    given = {"latents": torch.cat([noise, noise]), "num_inference_steps": 3, "output_type": "np"}
    alone = pipe([source, PROMPT], **given).images
    with manyheads.use(pipe, spec):
        led = pipe([source, PROMPT], **given).images
    page = Image.open(tmp_path / "grid.png")
    for column, picture in enumerate((alone[0], alone[1], led[1])):
        assert len(places(page, column, levels(picture))) == 1
    assert not np.array_equal(levels(alone[1]), levels(led[1]))


def test_a_pair_beside_an_image(cli, folders, tmp_path):
    """The source is an image; the pair starts from the noise that it would have come from."""
    pipe, spec = load_scenes(folders["scenes"]), "masactrl:start_step=1,start_layer=0"
    image = Image.fromarray(levels(made(pipe, "ghost top left ship", seed=3)))
    image.save(tmp_path / "photo.png")
    given = ["generate", "--model", str(folders["scenes"]), "--strategy", spec, "--source", str(tmp_path / "photo.png")]
    code, out, err = cli(*given, "--prompt", PROMPT, *STEPS, "--json")
    assert code == 0, err
    assert json.loads(out)["rows"][0]["source"] == str(tmp_path / "photo.png")
    noise = pipe.invert(image, 3)
    start = {"latents": torch.cat([noise, noise]), "num_inference_steps": 3, "output_type": "np"}
    back, alone = pipe(["", PROMPT], **start).images
    with manyheads.use(pipe, spec):
        _, led = pipe(["", PROMPT], **start).images
    page = Image.open(tmp_path / "grid.png")
    for column, picture in enumerate((back, alone, led)):
        assert len(places(page, column, levels(picture))) == 1
    assert not np.array_equal(levels(alone), levels(led))
    code, _, err = cli(*given, "--prompt", PROMPT, *STEPS, "--seeds", "0,1")
    assert code == 2 and "has its own noise" in err


def test_a_hole_is_filled(cli, folders, tmp_path):
    """The source is the image to fill in: no pair, and its pixels around the hole are in the picture."""
    pipe, rng = load_scenes(folders["scenes"]), np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    hole = np.zeros((32, 32), np.uint8)
    hole[:20, :20] = 255
    Image.fromarray(hole).save(tmp_path / "hole.png")
    spec, photo = f"harmonpaint:mask={tmp_path / 'hole.png'}", str(tmp_path / "photo.png")
    given = ["generate", "--model", str(folders["scenes"]), "--strategy", spec, "--source", photo, "--prompt", PROMPT]
    code, out, err = cli(*given, *STEPS, "--json", "--seeds", "0,1")
    assert code == 0, err
    facts = json.loads(out)
    assert [row["source"] for row in facts["rows"]] == [photo] * 2
    assert facts["arms"][1]["strategies"] == [f"{spec},source={photo}"]
    filled = levels(made(pipe, PROMPT, f"{spec},source={photo}"))
    source = np.asarray(Image.open(photo))
    assert np.array_equal(filled[hole == 0], source[hole == 0]) and not np.array_equal(filled, source)
    page = Image.open(tmp_path / "grid.png")
    for column, picture in enumerate((source, levels(made(pipe, PROMPT)), filled)):
        assert len(places(page, column, picture)) == (2 if column == 0 else 1)
    code, _, err = cli(*given, "--strategy", "masactrl:start_step=1", *STEPS)
    assert code == 2 and "make two calls" in err
    code, _, err = cli("generate", "--model", str(folders["scenes"]), "--strategy", "harmonpaint", *STEPS)
    assert code == 2 and "say where the hole is" in err


def test_films(cli, folders, tmp_path):
    base = (
        "generate",
        "--model",
        str(folders["moving"]),
        "--strategy",
        "pab:spatial=3",
        "--prompt",
        "apple up ship",
        *STEPS,
    )
    for out in ("a.gif", "a.webp", "a.png"):
        assert cli(*base, "--out", out)[0] == 0
    assert Image.open(tmp_path / "a.gif").n_frames == 8 == Image.open(tmp_path / "a.webp").n_frames
    strip = Image.open(tmp_path / "a.png")
    assert strip.width > 8 * 160 and strip.height > 3 * 160


def test_classes_by_number_and_label(cli, folders, tmp_path):
    base = ("generate", "--model", str(folders["dit"]), "--strategy", "pab", *STEPS, "--json")
    code, out, err = cli(*base, "--class", "1", "--class", "kitten", "--out", "grid.jpg")
    assert code == 0 and [row["class"] for row in json.loads(out)["rows"]] == [1, 1], err
    assert Image.open(tmp_path / "grid.jpg").format == "JPEG"


def test_text_and_the_page_of_maps(cli, folders, tmp_path):
    base = ("generate", "--model", str(folders["text"]), *STEPS, "--prompt", "a cat")
    code, _, err = cli(
        *base, "--strategy", "sag", "--samples", "2", "--size", "8x16", "--maps", "cat", "--page", "p/maps.html"
    )
    page = (tmp_path / "p" / "maps.html").read_text()
    assert code == 0 and "a cat, seed 1" in page and Image.open(tmp_path / "grid.png").height > 2 * 160, err
    code, _, err = cli(*base, "--strategy", "pab", "--maps", "dog")
    assert code == 2 and "is not in the prompt" in err


def test_a_pipeline_of_anything(cli, folders, tmp_path):
    base = ("generate", "--model", str(folders["anything"]), "--strategy", "pab", *STEPS)
    code, out, err = cli(*base, "--samples", "2", "--out", "grid.pdf", "--json")
    assert code == 0 and len(json.loads(out)["rows"]) == 2 and (tmp_path / "grid.pdf").read_bytes()[:4] == b"%PDF", err
    for options, word in ((["--prompt", "cat"], "it makes anything"), (["--guidance", "2"], "leave --guidance away")):
        code, _, err = cli(*base, *options)
        assert code == 2 and word in err


def test_maps_of_a_model_of_words(cli, folders, tmp_path):
    code, out, err = cli(
        "generate", "--model", str(folders["unet"]), "--maps", "apple+ship", "--prompt", PROMPT, *STEPS
    )
    assert code == 0 and "maps.html" in out and "apple" in (tmp_path / "maps.html").read_text(), err


BAD = [
    (["--strategy", "sagg"], "did you mean"),
    (["--strategy", "pab:spatail=2"], "no field 'spatail'"),
    (["--strategy", "pab:upper=1,lower=2"], "is empty"),
    (["--strategy", "pab:layers=99"], "finds no attention"),
    (["--strategy", "headhunter:heads=9.1"], "headhunter"),
    (["--strategy", "snapkv"], "does not act on the attention of a denoiser|denoiser has none"),
    (["--strategy", "tnl_lightning"], "does not act"),
    (["--strategy", "pab + "], r"either side of \+"),
    ([], "give --strategy"),
    (["--strategy", "masactrl:start_step=0,start_layer=0"], "give --source"),
    (["--strategy", "pab", "--prompt", "zebra"], "'zebra' is not known"),
    (["--strategy", "pab", "--class", "1"], "takes no --class; give --prompt"),
    (["--strategy", "pab", "--size", "8x8"], "leave --size away"),
    (["--strategy", "pab", "--size", "8"], "is no size"),
    (["--strategy", "pab", "--steps", "-1"], "--steps"),
    (["--strategy", "pab", "--seeds", "a"], "are no seeds"),
    (["--strategy", "pab", "--seeds", "1", "--samples", "2"], "not both"),
    (["--strategy", "pab", "--source", "apple"], "--source goes with"),
    (["--strategy", "pab", "--prompt", PROMPT, "--source", "file"], "is no image"),
    (["--strategy", "pab", "--out", "a.bmp"], "one of these endings"),
    (["--strategy", "pab", "--out", "file/a.png"], "cannot write"),
    (["--strategy", "pab", "--prompt", PROMPT, "--maps", "horse"], "is not in the prompt"),
    (["--strategy", "pab", "--maps", "apple", "--page", "file/a.html"], "cannot write"),
    (["--strategy", "pab", "--device", "gpu0"], "unknown device"),
    (["--strategy", "pab", "--dtype", "int8"], "unknown dtype"),
]


@pytest.mark.parametrize(("options", "word"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(cli, folders, tmp_path, options, word):
    (tmp_path / "file").write_text("")
    code, out, err = cli("generate", "--model", str(folders["scenes"]), *STEPS, *options)
    lines = [line for line in err.strip().splitlines() if line.startswith("error: ")]
    assert code == 2 and out == "" and "Traceback" not in err and len(lines) == 1, err
    assert re.search(word, lines[0]), err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(cli, folders):
    code, _, err = cli("generate", "--model", str(folders["scenes"]), "--strategy", "pab", "--device", "cuda")
    assert code == 2 and "torch sees no GPU" in err


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--prompt", "cat"], "takes no --prompt; give --class"),
        ([], "is conditioned on a class"),
        (["--class", "1000"], "classes 0 to 999"),
        (["--class", "dgo"], "did you mean 'dog'"),
        (["--class", "1", "--maps", "cat"], "takes no prompt; leave"),
    ],
)
def test_of_a_class(cli, folders, options, word):
    code, _, err = cli("generate", "--model", str(folders["dit"]), "--strategy", "pab", *options)
    assert code == 2 and word in err


def test_text_is_asked_for_and_sizes_are_the_pipelines_matter(cli, folders):
    base = ("generate", "--model", str(folders["text"]), "--strategy", "pab")
    code, _, err = cli(*base)
    assert code == 2 and "is conditioned on text; give --prompt" in err
    code, _, err = cli(*base, "--prompt", "cat", "--size", "7x7", *STEPS)
    assert code == 2 and "refuses" in err and "divisible" in err


def test_folders_that_are_no_pipeline(cli, folders, tmp_path):
    def refused(index=None, name="x"):
        if index is not None:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "model_index.json").write_text(json.dumps(index))
        code, _, err = cli("generate", "--model", name, "--strategy", "pab")
        assert code == 2 and len(err.strip().splitlines()) == 1
        return err

    assert "no such folder" in refused()
    assert "no pipeline 'Nothing'" in refused({"_class_name": "Nothing"})
    assert "no pipeline None" in refused([])
    assert "code of its own" in refused({"_class_name": "DiTPipeline", "vae": ["mine", "VAE"]})
    (tmp_path / "y").mkdir()
    assert "has no model_index.json" in refused(name="y")
    (tmp_path / "z").symlink_to(folders["dit"])
    assert (
        cli("generate", "--model", "z", "--strategy", "pab", "--class", "1", *STEPS)[0] == 0
    )  # the folder itself is fine
    copy = tmp_path / "w"
    for path in folders["dit"].rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(folders["dit"])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_suffix(".bin" if path.suffix == ".safetensors" else path.suffix).write_bytes(path.read_bytes())
    assert "safetensors only" in refused(name="w")


def test_a_grid_is_never_half_written(tmp_path, monkeypatch):
    out = tmp_path / "a.png"
    out.write_bytes(b"old")
    page = Image.new("RGB", (4, 4))

    def full(handle):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="disk full"):
        grid.save([page], out)
    monkeypatch.undo()
    assert out.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.png"]
    grid.save([page], out)
    assert Image.open(out).size == (4, 4)


def test_strategies_of_an_arm():
    assert [s.slug for s in arm("headhunter:heads=1.1+2.0 + pab").strategies] == ["headhunter", "pab"]
