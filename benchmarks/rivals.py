# SPDX-License-Identifier: Apache-2.0
"""The caches that are picked today beside each other at equal bytes, with the seconds that compressing takes.

    python benchmarks/rivals.py --model HuggingFaceTB/SmolLM2-135M-Instruct --device cuda --json benchmarks/rivals.json
    python benchmarks/rivals.py ... --networks FOLDER --gates FOLDER     # with kvzap and fastkvzip, trained before by
    python -m manyheads.recipes.kvzap --model MODEL --out FOLDER --text essays    # and recipes.fastkvzip

A share of the bytes of the whole cache in 16 bits is what every arm may hold: strategies that keep tokens keep that
share of them, ThinK as many more as its thinner keys leave room for, packed ones as their codes do. What each really
holds stands beside it. ``seconds`` is the time to read the prompt and choose what stays, over that of the whole cache,
in the same rounds. Then system prompts, with and without ``protect=system``: whether the rule in them is kept, and
whether the secret is given away. The text is prose, and the questions of ``chat.qa`` come after compression.
"""

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASKS = ("perplexity", "niah_single", "chat.qa:reply=0", "speed")
FIGURES = {
    "loss": "perplexity.token_nll", "needle_unseen": "niah_single.query_agnostic",
    "needle_seen": "niah_single.query_aware", "chosen": "chat.qa.chosen", "prompt": "speed.prefill",
}  # fmt: skip
TOKENS = (
    "random", "streaming_llm", "snapkv", "keydiff", "expected_attention", "finch:chunk_size=512",
    "triattention:schedule=prefill", "attention_matching", "kvzip", "kvzip:plus=true", "hedge:bits=none",
)  # fmt: skip
PROTECTED = ("random", "streaming_llm", "snapkv", "keydiff", "attention_matching", "kvzip", "hedge")
OF_PROMPT = ("preferred", "obeyed", "known", "followed", "leak", "spilled", "told")
CHANNELS = 0.6  # of the keys of ThinK


def strategies(share: float, networks: Path | None, gates: Path | None) -> list[str]:
    """Specs of all arms that hold ``share`` of the bytes."""

    def sized(spec: str, budget: float) -> str:
        return f"{spec}{',' if ':' in spec else ':'}budget={budget:g}"

    found = [sized(spec, share) for spec in (*TOKENS, "hedge")]
    if (more := 2 * share / (1 + CHANNELS)) <= 1:
        found.append(sized(f"think:base=snapkv,channels={CHANNELS}", round(more, 4)))
    if share >= 0.5:
        found += ["fp8", "fireq"]
    for slug, folder, name in (("kvzap", networks, "networks"), ("fastkvzip", gates, "sink_gates")):
        if folder is not None:
            found.append(sized(f"{slug}:modules={folder}", share))
            thresholds = json.loads((folder / f"{name}.json").read_text())["about"]["thresholds"]
            if f"{share:g}" in thresholds:
                found.append(f"{slug}:modules={folder},threshold={thresholds[f'{share:g}']}")
    return found


def measured(given: argparse.Namespace, specs: list[str], tasks: Sequence[str], length: int) -> dict[str, Any]:
    """The document of a comparison."""
    from manyheads.comparison import compare
    from manyheads.data.texts import corpus
    from manyheads.experiment import CausalLM
    from manyheads.report.summary import Summary

    subject = CausalLM(given.model)
    subject.load(given.device)
    with tempfile.TemporaryDirectory() as folder:
        results = compare(
            subject.model, subject.tokenizer, corpus("prose"), specs, [], tasks, lengths=[length],
            samples=given.samples, rounds=given.rounds, seed=given.seed, out=folder, origin=given.model,
        )  # fmt: skip
        document: dict[str, Any] = Summary(results).document()
    return document


def figures(arm: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """What was measured of an arm, by name; nothing where a task was skipped."""
    return {name: arm["figures"][key]["estimate"] for name, key in keys.items() if key in arm["figures"]}


def short(arm: str) -> str:
    """The arm without the folders of what was trained."""
    fields = [part for part in arm.replace(":", ":,", 1).split(",") if not part.startswith("modules=")]
    return ",".join(fields).replace(":,", ":")


def rivals(given: argparse.Namespace, share: float) -> dict[str, Any]:
    """Every arm at one share of the bytes."""
    document = measured(given, strategies(share, given.networks, given.gates), given.tasks.split(";"), given.length)
    whole, arms = document["arms"][0], []
    for arm in document["arms"]:
        found = figures(arm, FIGURES)
        if "prompt" in found:
            found["seconds"] = {"value": found["prompt"]["value"] - figures(whole, FIGURES)["prompt"]["value"]}
        arms.append({"arm": short(arm["arm"]), "kept": arm["bytes"] / whole["bytes"], "figures": found})
    return {
        "share": share, "length": given.length, "samples": given.samples, "rounds": given.rounds,
        "device": given.device, "arms": arms,
    }  # fmt: skip


def prompts(given: argparse.Namespace, share: float) -> dict[str, Any]:
    """System prompts under eviction, with and without protection."""
    specs = [f"{spec}:{more}budget={share:g}" for spec in PROTECTED for more in ("", "protect=system,")]
    task = f"chat.system_prompt:reply={given.reply}"
    document = measured(given, specs, (task,), given.prompt_length)
    keys = {name: f"chat.system_prompt.{name}" for name in OF_PROMPT}
    whole = document["arms"][0]["bytes"]
    arms = [
        {
            "arm": arm["arm"], "protected": "protect=" in arm["arm"], "kept": arm["bytes"] / whole,
            "figures": figures(arm, keys),
        }
        for arm in document["arms"]
    ]  # fmt: skip
    return {
        "share": share, "length": given.prompt_length, "samples": given.samples, "reply": given.reply,
        "device": given.device, "arms": arms,
    }  # fmt: skip


MEASURES = {"shares": rivals, "prompts": prompts}


def store(run: dict[str, Any], path: Path) -> None:
    """Put a run into the file, beside those of other models and with what an earlier one of this model has more."""
    from manyheads.files import write_atomically

    old = json.loads(path.read_text())["runs"] if path.exists() else []
    before = next((other for other in old if other["model"] == run["model"]), {})
    more = {
        kind: sorted(
            [*run[kind], *(x for x in before.get(kind, []) if x["share"] not in {y["share"] for y in run[kind]})],
            key=lambda x: -x["share"],
        )
        for kind in MEASURES
    }
    runs = [*(other for other in old if other["model"] != run["model"]), {**run, **more}]
    write_atomically(path, json.dumps({"runs": runs}, indent=1) + "\n")


def main() -> None:
    """Read the options, measure, print."""
    from manyheads.environment import commit, environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--name", help="of the model in the file; its last part if not given")
    parser.add_argument("--networks", type=Path, help="folder of kvzap's networks")
    parser.add_argument("--gates", type=Path, help="folder of fastkvzip's gates")
    parser.add_argument("--only", choices=("shares", "prompts"), help="strategies by share, or system prompts")
    parser.add_argument("--tasks", default=";".join(TASKS), help="of the strategies, parted by semicolons")
    parser.add_argument("--shares", default="0.5,0.25,0.1", help="of the bytes of the whole cache")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a context")
    parser.add_argument("--prompt-length", type=int, default=1024, help="tokens of a context with a system prompt")
    parser.add_argument("--reply", type=int, default=64, help="tokens of a written reply to it; 0 for none")
    parser.add_argument("--samples", type=int, default=48, help="contexts of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--seed", type=int, default=9001)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to put the run into")
    given = parser.parse_args()
    name = given.name or Path(given.model).name.lower()
    shares = [float(share) for share in given.shares.split(",")]
    run: dict[str, Any] = {
        "model": name, "seed": given.seed, "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(), "environment": environment(), "shares": [], "prompts": [],
    }  # fmt: skip
    jobs = [(kind, share) for kind in MEASURES for share in shares if given.only in (None, kind)]
    for kind, share in jobs:
        run[kind].append(MEASURES[kind](given, share))
        for arm in run[kind][-1]["arms"]:
            cells = [f"{key} {found['value']:.3f}" for key, found in arm["figures"].items()]
            print(f"{share:g} {arm['arm']}: kept {arm['kept']:.3f}, {', '.join(cells)}", flush=True)
        if given.json:
            store(run, given.json)
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
