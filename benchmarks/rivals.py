# SPDX-License-Identifier: Apache-2.0
r"""The caches that are picked today beside each other at equal bytes, with the seconds that compressing takes.

    python benchmarks/rivals.py --model HuggingFaceTB/SmolLM2-135M-Instruct --device cuda --json benchmarks/rivals.json
    python benchmarks/rivals.py ... --networks FOLDER --gates FOLDER     # with kvzap and fastkvzip, trained before by
    python -m manyheads.recipes.kvzap --model MODEL --out FOLDER --text essays    # and recipes.fastkvzip

A share of the bytes of the whole cache in 16 bits is what every arm may hold: strategies that keep tokens keep that
share of them, ThinK as many more as its thinner keys leave room for, packed ones as their codes do. What each really
holds stands beside it. ``seconds`` is the time to read the prompt and choose what stays, over that of the whole cache,
in the same rounds. Then system prompts, with and without ``protect=system``: whether the rule in them is kept, and
whether the secret is given away. The text is prose, and the questions of ``chat.qa`` come after compression.

Every arm stands beside ``hedge`` in differences paired by context, and ``columns`` of the file says for each share and
length whether ``hedge`` is better than every rival in no more bytes (*best*), behind one, or not told apart from the
best. With ``--out`` a call that was cut off goes on where it was; with ``--limit`` it stops by itself after so many
seconds and writes what it has:

    python benchmarks/rivals.py ... --only shares --tasks "perplexity;niah_single" --lengths 2048,4096,8064 \\
        --shares 0.5,0.25,0.1,0.05 --out runs/rivals --limit 480 --json benchmarks/rivals_lengths.json
"""

import argparse
import datetime
import json
import sys
import tempfile
import time
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
    "hedge:agnostic=reconstruction",
)  # fmt: skip
PROTECTED = ("random", "streaming_llm", "snapkv", "keydiff", "attention_matching", "kvzip", "hedge")
OF_PROMPT = ("preferred", "obeyed", "known", "followed", "leak", "spilled", "told")
CHANNELS = 0.6  # of the keys of ThinK
# Times its share, or what hedge holds where layers with a window are whole, is what an arm may hold to be a rival:
# positions and uneven heads count, too.
ROOM = 1.25


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


class TimeIsUp(Exception):
    """The seconds that were given are over."""


def measured(given: argparse.Namespace, specs: list[str], tasks: Sequence[str], length: int, share: float) -> Any:
    """The summary of a comparison, of what there is of it when the time is up; None where that is nothing."""
    from manyheads.comparison import compare
    from manyheads.data.texts import corpus
    from manyheads.experiment.journal import Results
    from manyheads.report.summary import Summary

    def progress(done: float, total: float, message: str) -> None:
        if time.monotonic() > given.end:
            raise TimeIsUp

    with tempfile.TemporaryDirectory() as folder:
        place = (given.out or Path(folder)) / f"{given.name}-{tasks[0].split(':')[0]}-{length}-{share:g}"
        try:
            results = compare(
                given.subject.model, given.subject.tokenizer, corpus(given.text), specs, [], tasks, lengths=[length],
                samples=given.samples, rounds=given.rounds, seed=given.seed, out=place, origin=given.model,
                progress=progress,
            )  # fmt: skip
        except TimeIsUp:
            results = Results.read(place)
        return Summary(results) if results.rows else None


def figures(arm: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """What was measured of an arm, by name; nothing where a task was skipped."""
    return {name: arm["figures"][key]["estimate"] for name, key in keys.items() if key in arm["figures"]}


def beside_hedge(summary: Any, share: float) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """What each arm has more than ``hedge``, paired by context, and where ``hedge`` stands among its rivals."""
    ours = next((arm for arm in summary.arms if arm.name == "hedge"), None)
    more: dict[str, dict[str, Any]] = {arm.key: {} for arm in summary.arms}
    room = ROOM * max(share, held(summary, ours)) if ours is not None else 0.0
    stands: dict[str, Any] = {}
    for name in ("loss", "needle_unseen", "needle_seen"):
        one = next((one for one in summary.measured if one.key == FIGURES[name]), None)
        if one is None or ours is None or summary.estimate(one, ours) is None:
            continue
        better, rivals = 1 if one.metric.higher else -1, []
        for arm in summary.arms:
            apart = summary.delta(one, arm, than=ours)
            if apart is None:
                continue
            more[arm.key][name] = apart.plain()
            if arm is not summary.base and not arm.name.startswith("hedge") and held(summary, arm) <= room:
                rivals.append((better * apart.value, short(arm.name), apart))
        if not rivals:
            continue
        top, rival, apart = max(rivals, key=lambda x: x[0])
        ahead = [name for value, name, apart in rivals if value > 0 and apart.excludes_zero]
        word = "behind" if ahead else "level"
        if top < 0 and all(value < 0 and apart.excludes_zero for value, _, apart in rivals):
            word = "best"
        stands[name] = {
            "word": "tells nothing" if one.weak else word, "rival": rival, "ahead": ahead, "rivals": len(rivals),
            "rival_less_hedge": apart.plain(),
        }  # fmt: skip
    return more, stands


def held(summary: Any, arm: Any) -> float:
    """Bytes of an arm over those of the whole cache; infinite where nothing looked."""
    whole, mine = summary.held(summary.base), summary.held(arm)
    return mine / whole if whole and mine else float("inf")


def short(arm: str) -> str:
    """The arm without the folders of what was trained."""
    fields = [part for part in arm.replace(":", ":,", 1).split(",") if not part.startswith("modules=")]
    return ",".join(fields).replace(":,", ":")


def rivals(given: argparse.Namespace, share: float, length: int) -> dict[str, Any] | None:
    """Every arm at one share of the bytes; None where there was no time for any."""
    specs = strategies(share, given.networks, given.gates)
    if given.arms:
        wanted = given.arms.split(";")
        specs = [spec for spec in specs if short(spec).split("budget=")[0].rstrip(":,") in wanted]
    summary = measured(given, specs, given.tasks.split(";"), length, share)
    if summary is None:
        return None
    document, (more, stands) = summary.document(), beside_hedge(summary, share)
    whole, arms = document["arms"][0], []
    for arm in document["arms"]:
        found = figures(arm, FIGURES)
        if not found or arm["bytes"] is None:
            continue
        if "prompt" in found:
            found["seconds"] = {"value": found["prompt"]["value"] - figures(whole, FIGURES)["prompt"]["value"]}
        arms.append({
            "arm": short(arm["arm"]), "kept": arm["bytes"] / whole["bytes"], "figures": found,
            "less_hedge": more[arm["arm"]],
        })  # fmt: skip
    return {
        "share": share, "length": length, "samples": given.samples, "rounds": given.rounds, "text": given.text,
        "device": given.device, "finished": document["finished"], "stands": stands, "arms": arms,
    }  # fmt: skip


def prompts(given: argparse.Namespace, share: float, length: int) -> dict[str, Any] | None:
    """System prompts under eviction, with and without protection; None where there was no time for any."""
    specs = [f"{spec}:{more}budget={share:g}" for spec in PROTECTED for more in ("", "protect=system,")]
    summary = measured(given, specs, (f"chat.system_prompt:reply={given.reply}",), length, share)
    if summary is None:
        return None
    document = summary.document()
    keys = {name: f"chat.system_prompt.{name}" for name in OF_PROMPT}
    whole = document["arms"][0]["bytes"]
    arms = [
        {
            "arm": arm["arm"], "protected": "protect=" in arm["arm"], "kept": arm["bytes"] / whole,
            "figures": figures(arm, keys),
        }
        for arm in document["arms"]
        if arm["bytes"] is not None
    ]  # fmt: skip
    return {
        "share": share, "length": length, "samples": given.samples, "reply": given.reply, "text": given.text,
        "device": given.device, "finished": document["finished"], "arms": arms,
    }  # fmt: skip


MEASURES = {"shares": rivals, "prompts": prompts}


def store(run: dict[str, Any], path: Path) -> None:
    """Put a run into the file, beside those of other models and with what an earlier one of this model has more."""
    from manyheads.files import write_atomically

    def case(entry: dict[str, Any]) -> tuple[int, float]:
        return entry["length"], -entry["share"]

    old = json.loads(path.read_text())["runs"] if path.exists() else []
    before = next((other for other in old if other["model"] == run["model"]), {})
    more = {}
    for kind in MEASURES:
        mine = {case(entry) for entry in run[kind]}
        more[kind] = sorted([*run[kind], *(x for x in before.get(kind, []) if case(x) not in mine)], key=case)
    runs = [*(other for other in old if other["model"] != run["model"]), {**run, **more}]
    columns = [
        {
            "model": one["model"], "length": entry["length"], "share": entry["share"], "text": entry["text"],
            "samples": entry["samples"], "finished": entry["finished"], "device": entry["device"],
            "rivals": max(found["rivals"] for found in entry["stands"].values()),
            **{name: said(found) for name, found in entry["stands"].items()},
        }
        for one in sorted(runs, key=lambda one: str(one["model"]), reverse=True)
        for entry in one["shares"]
        if entry.get("stands")
    ]  # fmt: skip
    write_atomically(path, json.dumps({"runs": runs, "columns": columns}, indent=1) + "\n")


def said(found: dict[str, Any]) -> str:
    """Where hedge stands, in a cell of a table: the word, then the best rival and what it has more than hedge."""
    apart, word = found["rival_less_hedge"], found["word"]
    numbers = [f"{apart[name]:+.3f}" for name in ("value", "low", "high") if apart[name] is not None]
    interval = f" ({numbers[1]} to {numbers[2]})" if len(numbers) == 3 else ""
    others = ", ".join(name for name in found["ahead"] if name != found["rival"])
    return f"{word}; {found['rival']} {numbers[0]}{interval}{f'; also ahead: {others}' if others else ''}"


def main() -> None:
    """Read the options, measure, print."""
    from manyheads.environment import commit, environment
    from manyheads.experiment import CausalLM

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--name", help="of the model in the file; its last part if not given")
    parser.add_argument("--networks", type=Path, help="folder of kvzap's networks")
    parser.add_argument("--gates", type=Path, help="folder of fastkvzip's gates")
    parser.add_argument("--only", choices=("shares", "prompts"), help="strategies by share, or system prompts")
    parser.add_argument("--tasks", default=";".join(TASKS), help="of the strategies, parted by semicolons")
    parser.add_argument("--shares", default="0.5,0.25,0.1", help="of the bytes of the whole cache")
    parser.add_argument("--arms", help="some of the strategies, without their budgets, parted by semicolons")
    parser.add_argument("--text", default="prose", help="what is read: prose, essays or code")
    parser.add_argument("--lengths", default="2048", help="tokens of a context")
    parser.add_argument("--prompt-length", type=int, default=1024, help="tokens of a context with a system prompt")
    parser.add_argument("--reply", type=int, default=64, help="tokens of a written reply to it; 0 for none")
    parser.add_argument("--samples", type=int, default=48, help="contexts of each kind")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing")
    parser.add_argument("--seed", type=int, default=9001)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="folder to go on from where a call was cut off")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which to stop and write")
    parser.add_argument("--json", type=Path, help="file to put the run into")
    given = parser.parse_args()
    given.end = time.monotonic() + given.limit
    given.name = given.name or Path(given.model).name.lower()
    given.subject = CausalLM(given.model)
    given.subject.load(given.device)
    run: dict[str, Any] = {
        "model": given.name, "seed": given.seed, "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(), "environment": environment(), "shares": [], "prompts": [],
    }  # fmt: skip
    lengths = {"shares": [int(x) for x in given.lengths.split(",")], "prompts": [given.prompt_length]}
    shares = [float(share) for share in given.shares.split(",")]
    jobs = [
        (kind, length, share)
        for kind in MEASURES if given.only in (None, kind)
        for length in lengths[kind] for share in shares
    ]  # fmt: skip
    for kind, length, share in jobs:
        found = MEASURES[kind](given, share, length) if time.monotonic() < given.end else None
        if found is None:
            raise SystemExit("time is up: the same call goes on from --out")
        run[kind].append({**found, **{name: run[name] for name in ("date", "commit", "environment")}})
        for arm in found["arms"]:
            cells = [f"{key} {one['value']:.3f}" for key, one in arm["figures"].items()]
            print(f"{length} {share:g} {arm['arm']}: kept {arm['kept']:.3f}, {', '.join(cells)}", flush=True)
        for name, stands in found.get("stands", {}).items():
            print(f"{length} {share:g} hedge, {name}: {said(stands)}", flush=True)
        if given.json:
            store(run, given.json)
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
