# SPDX-License-Identifier: Apache-2.0
"""Every conversion at equal parameters on a published model: loss, time for a prompt and for a token, bytes.

    python benchmarks/smaller.py --model smollm2-135m-instruct --json benchmarks/smaller.json
    python benchmarks/smaller.py --model smollm2-135m-instruct --device cuda --steps 500 --json benchmarks/smaller.json

Each is asked for the largest model with at most a share of the parameters, and calibrated on the same windows of
WikiText-2; losses are of its last tenth, which nothing else reads. With ``--steps`` each is trained afterwards, as it
says itself. Nothing is chosen by what was measured. A run that was cut off goes on with the same ``--out``.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any, Literal

KEEP = (0.8, 0.7)
PARTS: tuple[Literal["mlp", "block"], ...] = ("mlp", "block")
WAYS = {
    "minitron: neurons": "minitron:keep={keep},axis=neurons",
    "minitron: width and neurons": "minitron:keep={keep},axis=both",
    "minitron: layers": "minitron:keep={keep},axis=layers",
    "amp: heads and neurons": "amp:keep={keep}",
    "amp, refit": "amp:keep={keep},refit=true",
    "Wanda's score: neurons": "structured_pruning:keep={keep},axis=neurons",
    "Wanda's score: neurons, refit": "structured_pruning:keep={keep},axis=neurons,refit=true",
    "LLM-Pruner's score: heads and neurons": "structured_pruning:keep={keep},axis=heads_neurons,score=taylor",
    "at random: neurons": "structured_pruning:keep={keep},axis=neurons,score=random",
    "skip_attn: deepest feed-forward parts": "skip_attn:part=mlp,skip={mlp}",
    "skip_attn: feed-forward parts by cosine": "skip_attn:part=mlp,skip={mlp},choose=cosine",
    "skip_attn: deepest blocks": "skip_attn:part=block,skip={block}",
    "skip_attn: blocks by cosine": "skip_attn:part=block,skip={block},choose=cosine",
}


def skipped(model: Any, part: Literal["mlp", "block"], keep: float) -> float:
    """The smallest share of layers without which no more than ``keep`` of the parameters are left."""
    from manyheads.conversion import Drop, SurgeryPlan
    from manyheads.integrations.anatomy import ModelAnatomy

    anatomy = ModelAnatomy(model)
    layers = len(anatomy.layers)
    for count in range(1, layers):
        plan = SurgeryPlan((Drop(part=part, layers=tuple(range(layers - count, layers))),))
        if anatomy.parameters(plan) <= keep * anatomy.parameters():
            return count / layers
    raise SystemExit(f"without all {part} parts more than {keep} of the parameters are left")


def rows_of(results: Any) -> list[dict[str, Any]]:
    """A row for each arm: its figures, and their difference to the whole model's, of times the ratio."""
    from manyheads.report.summary import Summary

    summary = Summary(results)
    rows = []
    for arm in summary.arms:
        way, _, keep = arm.name.rpartition(" at ")
        row: dict[str, Any] = {"way": way or arm.name, "keep": float(keep) if way else 1.0}
        for one in summary.measured:
            found, delta = summary.estimate(one, arm), summary.delta(one, arm)
            if found is not None:
                row[one.metric.name] = found.value
            if delta is not None and arm is not summary.base:
                row[f"{one.metric.name}_more"] = {"value": delta.value, "low": delta.low, "high": delta.high}
        row["tokens_per_second"] = 1000 / row["decode"]
        rows.append(row)
    return rows


def main() -> None:
    """Measure on one model, print, and write its figures into the file."""
    from manyheads.environment import commit, environment
    from manyheads.experiment import Arm, Experiment, Sizes
    from manyheads.experiment.runner import run
    from manyheads.experiment.subjects import Convertible
    from manyheads.files import write_atomically
    from manyheads.tasks.text.converted_loss import ConvertedLoss
    from manyheads.tasks.text.converted_speed import ConvertedSpeed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="hub name, known name or folder")
    parser.add_argument("--windows", type=int, default=16, help="that losses are of")
    parser.add_argument("--sequences", type=int, default=12, help="of the calibration")
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--prompt", type=int, default=256, help="tokens that are read under the clock")
    parser.add_argument("--rounds", type=int, default=3, help="of the clock")
    parser.add_argument("--steps", type=int, default=0, help="of the recovery; 0 for none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("smaller"), help="folder of the run, to go on with")
    parser.add_argument("--json", type=Path, help="file to put the figures of this model into")
    given = parser.parse_args()
    subject = Convertible(given.model, dtype="float32")
    subject.load(given.device)
    options = {"recover": True} if given.steps else {}
    arms = []
    for keep in KEEP:
        shares = {part: round(skipped(subject.model, part, keep), 4) for part in PARTS}
        arms += [
            Arm(f"{way} at {keep}", spec.format(keep=keep, **shares), options=options) for way, spec in WAYS.items()
        ]
    loss = ConvertedLoss(length=given.length, windows=given.windows, sequences=given.sequences, steps=given.steps)
    plan = Experiment(
        subject=subject, arms=tuple(arms), baseline=Arm("the whole model"), equal="parameters", sizes=Sizes(),
        tasks=(loss, ConvertedSpeed(prompt=given.prompt, rounds=given.rounds)), seeds=1,
    ).at("cpu" if given.device == "cpu" else "cuda")  # fmt: skip
    results = run(plan, given.out, device=given.device, progress=lambda done, all_, what: print(what, flush=True))
    rows = rows_of(results)
    for row in rows:
        print(row)
    if given.json:
        name = f"{Path(given.model).name.lower()}, {given.steps} steps, {given.device}"
        kept = json.loads(given.json.read_text())["runs"] if given.json.exists() else {}
        kept[name] = {
            "command": " ".join(["python", "benchmarks/smaller.py", *sys.argv[1:]]), "commit": commit(),
            "date": datetime.date.today().isoformat(), "environment": environment(), "text": loss.text,
            "windows": given.windows, "length": given.length, "sequences": given.sequences, "prompt": given.prompt,
            "rows": rows,
        }  # fmt: skip
        write_atomically(given.json, json.dumps({"runs": kept}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
