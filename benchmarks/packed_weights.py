# SPDX-License-Identifier: Apache-2.0
"""What packed weights cost the shipped models: each beside its plain weights, on the same texts and the same noise.

    python benchmarks/packed_weights.py --plain FOLDER --json benchmarks/packed_weights.json

Of the UNet the first and last convolution are shipped in float16: with the last one packed its pictures were 27 dB from
those of its plain weights. Claims on it that say an older commit were measured with all of it in float16.

FOLDER holds ``default`` and ``pipelines/NAME`` with plain weights, as the recipes had them before they were packed.
Loss and planted constants are those of the card of the default model; a picture is compared with the picture that the
plain weights make of the same noise, beside what bfloat16 arithmetic alone changes in it.
"""

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

NAMES = ("default", "scenes", "unet", "moving", "moving3d")


def language(plain: Path, device: str, files: int, count: int) -> dict[str, Any]:
    """Loss by token and recall of planted constants, packed minus plain, paired by text."""
    from transformers import AutoModelForCausalLM

    from manyheads import models
    from manyheads.experiment.estimates import difference, estimate
    from manyheads.experiment.rows import Metric, Row
    from manyheads.recipes._evaluate import losses, recall, stdlib_tokens
    from manyheads.recipes._planted import Planter

    packed, tokenizer = models.load_default(device, torch.float32)
    other: Any = AutoModelForCausalLM.from_pretrained(plain / "default", dtype=torch.float32).to(device).eval()
    text = stdlib_tokens(tokenizer.backend_tokenizer, 2048, files=files)
    windows = [ids[:1024] for ids in text.values() if len(ids) >= 1024]
    metric, rows = Metric("loss", "loss", "nats"), {}
    for name, model in (("packed", packed), ("plain", other)):
        rows[name] = [
            Row(task="loss", metric="loss", arm=name, value=float(losses(model, [ids], 512).mean()), sample=str(i))
            for i, ids in enumerate(windows)
        ]
    planter = Planter.build(tokenizer.backend_tokenizer, ("alpha", "budget", "limit", "needle", "window"), 1, 300)
    found = {
        name: recall(model, planter, text, 1024, "several", count, np.random.default_rng(0)).value
        for name, model in (("packed", packed), ("plain", other))
    }
    return {
        "texts": len(windows), "loss": {name: estimate(mine, metric).plain() for name, mine in rows.items()},
        "difference": difference(rows["packed"], rows["plain"], metric).plain(),
        "constants": {"asked": count, "length": 1024, **found},
    }  # fmt: skip


def pictures(plain: Path, name: str, device: str, count: int) -> dict[str, Any]:
    """PSNR of pictures of the packed weights, and of bfloat16 arithmetic, to those of the plain weights."""
    from manyheads.models.scenes import load_scenes

    def made(pipe: Any) -> torch.Tensor:
        noise = pipe.noise(count, torch.Generator().manual_seed(0))
        out = pipe([""] * count, num_inference_steps=20, latents=noise, guidance_scale=1.0, output_type="pt")
        return (out.frames if name.startswith("moving") else out.images).float().cpu()

    want = made(load_scenes(plain / "pipelines" / name, device))
    arms = {
        "packed": load_scenes(name, device),
        "bfloat16 arithmetic": load_scenes(plain / "pipelines" / name, device, torch.bfloat16),
    }
    found = {}
    for arm, pipe in arms.items():
        errors = (made(pipe) - want).square().flatten(1).mean(1).clamp(min=1e-12)
        psnr = -10 * errors.log10()
        found[arm] = {"median_psnr_db": float(psnr.median()), "lowest_psnr_db": float(psnr.min())}
    return {"pictures": count, "steps": 20, **found}


def main() -> None:
    """Measure, print, and write the file."""
    from manyheads.environment import commit, environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--files", type=int, default=24)
    parser.add_argument("--constants", type=int, default=60)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="models; others in the file stay")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    about = {"date": datetime.date.today().isoformat(), "commit": commit(), "environment": environment()}
    found: dict[str, Any] = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    with torch.inference_mode():
        for name in given.only:
            if name == "default":
                made = language(given.plain, given.device, given.files, given.constants)
            else:
                made = pictures(given.plain, name, given.device, given.pictures)
            print(json.dumps({name: made}, indent=1))
            found[name] = {**about, **made}
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
