# SPDX-License-Identifier: Apache-2.0
"""Random command lines: each ends well or with one line that says what to mend, never as a defect.

A few are tried here. ``python -m commands.test_fuzz 150 [SEED]`` in the folder of the tests tries more, with verbs that
compute, and prints those that fail.
"""

import contextlib
import io
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import pytest

from manyheads.cli import main
from tiny import inspect as tiny

FEW, SEED = 40, 0
CHEAP = ("list", "find", "show", "claims", "report", "nonsense", "--version", "--help")
DEAR = ("inspect", "doctor", "ask", "compare", "generate")

GOOD = 0.6  # share of the options whose value is the first, which is a good one

# What may stand after an option, good and bad.
NUMBERS = ["1", "0", "2", "16", "40", "-1", "1e3", "x", ""]
SPECS = [
    "full",
    "auto",
    "auto:budget=0.5",
    "snapkv:window_size=4",
    "snapkv:budget=0",
    "snapkv:budget=2.5",
    "h2o:schedule=step",
    "graphkv:base=keydiff",
    "graphkv:base=full",
    "graphkv:base=(",
    "knorm + snapkv",
    "knorm + ablate:heads=0.1",
    "+",
    "ablate:heads=9.9",
    "fireq:bits=int3",
    "tnl_lightning",
    "sag",
    "pab",
    "nonsense",
    "knorm:layers=9",
    "knorm:layers=1-0",
    "streaming_llm:sinks=-1",
    "adakv:base=nothing",
    "expected_attention:future=0",
    "mla_hw",
    "hcattention",
    "hcattention:codebooks=nowhere",
    "kivi:budget=0.5",
    "",
    ":",
]
LENSES = [
    "sinks",
    "massive",
    "rhythm",
    "spans",
    "spans:system=0-4",
    "spans:system=9-2",
    "active_dormant:layers=9",
    "sinks:layers=1",
    "massive_values:threshold=-1",
    "safety_heads",
    "strategy_attention:span=nobody",
    "sag",
    "nonsense",
    "",
    "sinks,",
]
DEVICES = ["cpu", "mps", "cuda", "cuda:7", "meta", "tpu", ""]
DTYPES = ["float32", "bfloat16", "float16", "int8", "float64"]
TASKS = ["perplexity", "niah_single", "memory", "speed", "nonsense", "scene_quality", "byte_lm", ""]
WORDS = ["apple top left", "shrink the cache", "", "x", "kv", "%%%", "needle in a haystack"]
SLUGS = ["hashevict", "snapkv", "auto", "full", "hashevikt", "", "diffusion", "a b", "safety_heads.ahd", "d2o"]


def options(draw, place):
    """Texts to draw the values of each option from."""

    def path(*names):
        return [str(place / name) for name in names]

    text = [*path("text.txt", "short.txt", "nothing.txt", "empty.txt", "bytes.bin"), "essays", "code", str(place)]
    models = path("model", "model", "model", "model", "nowhere", "text.txt", "empty")
    return {
        "--model": models,
        "--text": text,
        "--device": DEVICES,
        "--dtype": DTYPES,
        "--seed": NUMBERS,
        "--out": [str(place / f"out-{draw.randrange(10**9)}"), *path("out", "text.txt")],
        "--length": ["16", "40", *NUMBERS],
        "--samples": ["1", "2", *NUMBERS],
        "--lens": LENSES,
        "--layers": ["0", "0-1", "9", "x", "1-0"],
        "--ablate": ["sink", "first token", "nothing"],
        "--role": ["system=0-4", "system=4", "x", "system=import", "a=0-0"],
        "--chat": path("chat.json", "bad.json", "nothing.json"),
        "--generate": NUMBERS,
        "--json": [None],
        "--quick": [None],
        "--strategy": ["snapkv:window_size=4", *SPECS],
        "--strategies": SPECS,
        "--budgets": ["0.5", "0.25,8", "0", "2.5", "x", "-1"],
        "--tasks": TASKS,
        "--lengths": ["64", "128", "0", "x", "100000000"],
        "--workers": ["1", "0", "x"],
        "--context": text[1:5],
        "--max-new-tokens": ["1", "4", "0", "x"],
        "--plain": [None],
        "--category": ["caches", "domains", "nonsense", ""],
        "--state": ["planned", "x"],
        "--limit": NUMBERS,
        "--page": path("page.html", "model"),
        "--steps": ["1", "2", "0", "x"],
        "--prompt": WORDS,
        "--maps": ["apple", ""],
        "--budget": ["2M", "x"],
        "--train": [None],
        "--resume": path("out", "nowhere"),
        "--minutes": ["0", "x"],
        "--debug": [],
    }


USED = {
    "list": ["--category", "--state", "--json", "--limit"],
    "find": ["--limit", "--json"],
    "show": ["--json"],
    "claims": ["--json", "--page"],
    "report": ["--json"],
    "inspect": [
        "--text",
        "--lens",
        "--role",
        "--chat",
        "--generate",
        "--length",
        "--samples",
        "--layers",
        "--ablate",
        "--device",
        "--dtype",
        "--seed",
        "--json",
    ],
    "doctor": ["--text", "--chat", "--length", "--samples", "--device", "--dtype", "--seed", "--json"],
    "ask": ["--strategy", "--max-new-tokens", "--plain", "--device", "--dtype", "--json"],
    "compare": [
        "--text",
        "--strategies",
        "--budgets",
        "--tasks",
        "--lengths",
        "--device",
        "--dtype",
        "--seed",
        "--json",
        "--workers",
    ],
    "generate": ["--strategy", "--prompt", "--steps", "--seed", "--device", "--dtype", "--json", "--maps", "--page"],
}
ALWAYS = {
    "inspect": ["--model", "--quick", "--out"],
    "doctor": ["--model", "--quick", "--out"],
    "ask": ["--model", "--context"],
    "compare": ["--model", "--quick", "--out"],
}


def command(draw, place, verbs):
    """A command line: a verb, its arguments, options of its own, and now and then one of another verb's."""
    verb = draw.choice(verbs)
    line, known = [verb], options(draw, place)
    if verb in ("find", "show", "report", "ask"):
        kinds = {"find": WORDS, "show": SLUGS, "report": [str(place / "out"), str(place)], "ask": WORDS}
        line += draw.choices(kinds[verb], k=draw.choice([1, 1, 1, 0, 2]))
    if verb == "claims":
        line += draw.choice([[], ["list"], ["show", draw.choice(SLUGS)], ["run"], ["run", "nonsense"], ["x"]])
    mine = USED.get(verb, [])
    chosen = [*ALWAYS.get(verb, []), *draw.sample(mine, min(len(mine), draw.choice([0, 1, 1, 2, 3])))]
    if draw.random() < 0.1:
        chosen.append(draw.choice([*known, "--nonsense"]))
    for name in chosen:
        values = known.get(name) or [None]
        value = values[0] if draw.random() < GOOD else draw.choice(values)
        line += [name] if value is None else [name, value]
    if verb == "compare":  # small, whatever else was drawn
        line += ["--samples", "1"] * ("--samples" not in line) + ["--lengths", "64"] * ("--lengths" not in line)
        line += ["--tasks", "memory"] * ("--tasks" not in line)
        line += ["--strategies", "knorm"] * ("--strategies" not in line)
    if verb == "generate":
        line += ["--strategy", "sag"] * ("--strategy" not in line) + ["--prompt", "apple top left"] * (
            "--prompt" not in line
        )
        line += ["--out", str(place / "grid.png")] + ["--steps", "1"] * ("--steps" not in line)
    return line


def tried(line):
    """Exit code, and what was printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            main(line)
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue()


def fault(line):
    """What is wrong with how a command line ends; empty where nothing is."""
    try:
        code, said = tried(line)
    except BaseException as error:  # whatever passes the command line's own net
        return f"{type(error).__name__}: {error}"
    if code not in (0, 2) or "Traceback" in said or "defect" in said:
        return said[-500:] or f"exit code {code}"
    last = said.strip().splitlines()[-1:] or [""]
    if code == 2 and not any(line.startswith("error: ") for line in said.splitlines()):
        return f"no reason: {last[0]}"
    return ""


def prepare(place):
    """What the command lines name."""
    texts = tiny.standard_library()[:12]
    tiny.make_model().save_pretrained(place / "model")
    tiny.make_tokenizer(texts).save_pretrained(place / "model")
    (place / "text.txt").write_text("\n".join(text.content for text in texts[:3]))
    (place / "short.txt").write_text(texts[0].content[:300])
    (place / "empty.txt").write_text("")
    (place / "bytes.bin").write_bytes(bytes(range(256)))
    (place / "empty").mkdir()
    messages = [{"role": "user", "content": "Where is it? " * 8}, {"role": "assistant", "content": "There."}]
    (place / "chat.json").write_text(json.dumps(messages))
    (place / "bad.json").write_text("[1, 2")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    made = tmp_path_factory.mktemp("fuzz")
    prepare(made)
    return made


def test_random_command_lines_end_well(place, monkeypatch):
    monkeypatch.chdir(place)
    draw = random.Random(SEED)
    lines = [command(draw, place, (*CHEAP, *CHEAP, "inspect", "ask")) for _ in range(FEW)]
    found = {" ".join(line): wrong for line in lines if (wrong := fault(line))}
    assert not found
    assert sum(tried(line)[0] == 0 for line in lines[:20]) > 3  # not all of them are refused


def test_the_net_has_holes_where_it_should(monkeypatch):
    """The control: a verb that raises what no user can mend is found."""
    monkeypatch.setattr("manyheads.catalog.find", lambda *_: 1 / 0)
    assert "ZeroDivisionError" in fault(["find", "cache"])


if __name__ == "__main__":
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else SEED
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        os.chdir(folder)
        draw = random.Random(seed)
        for number in range(count):
            line = command(draw, Path(folder), (*CHEAP, *DEAR, *DEAR))
            if wrong := fault(line):
                print(f"{number}: manyheads {' '.join(map(repr, line))}\n    {wrong}\n", flush=True)
