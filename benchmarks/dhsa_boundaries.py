# SPDX-License-Identifier: Apache-2.0
"""How well DHSA's boundary predictor learns, and how long it takes: held-out loss and correlation for several seeds.

    python benchmarks/dhsa_boundaries.py --json benchmarks/dhsa_boundaries.json [--save FOLDER]

Texts of ``--text`` are read once by the frozen model; the last two are held out. The loss of always saying the mean
label stands beside the predictor's. ``--save`` keeps the predictor of the first seed, in float16: the one that ships
for SmolLM2-135M-Instruct was made so.
"""

import argparse
import datetime
import json
import time
from pathlib import Path

import numpy as np
import torch

import manyheads
from manyheads import models
from manyheads.data.texts import corpus
from manyheads.environment import environment
from manyheads.mixers.dhsa import fit_boundaries


def main() -> None:
    """Fit, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--text", default="essays")
    parser.add_argument("--texts", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, tokenizer = models.load(given.model, given.device, torch.float32)
    read = [tokenizer(text.content).input_ids for text in corpus(given.text)]
    ids = torch.from_numpy(np.array([row[: given.tokens] for row in read if len(row) >= given.tokens][: given.texts]))
    found = []
    for seed in range(given.seeds):
        start, used = time.perf_counter(), time.process_time()
        made = fit_boundaries(model, ids, port=manyheads.use, steps=given.steps, held_out=2, seed=seed)
        found.append(
            {
                **made.about,
                "seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - used, 1),
            }
        )
        print(json.dumps(found[-1]), flush=True)
        if given.save and not seed:
            made.net.half()
            made.about.update(model=given.model, text=f"{given.text}, by benchmarks/dhsa_boundaries.py --save")
            made.save(given.save)
    if given.json:
        settings = {key: value for key, value in vars(given).items() if key not in ("json", "save")}
        about = {"date": datetime.date.today().isoformat(), "environment": environment(), **settings, "seeds": found}
        given.json.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
