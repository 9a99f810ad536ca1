# SPDX-License-Identifier: Apache-2.0
"""Cache strategies of manyheads and of kvpress on one published model and the same tokens: loss, needle, bytes.

    pip install --target peer --no-deps kvpress==0.5.5 "transformers==5.2.*" "tokenizers==0.22.*" "huggingface-hub<2" \
        "cachetools<6" "fire<0.7" termcolor datasets pandas pyarrow multiprocess dill xxhash httpx httpcore h11 anyio
    python benchmarks/peer_quality.py --model HuggingFaceTB/SmolLM2-135M-Instruct --peer peer --text essays

kvpress 0.5.5 needs transformers below 5.3, so a second process measures its presses with a folder of its own. Both get
the same token ids and do the same with them: a context is read and compressed, then a question or the text's next
tokens are fed behind it, in one forward, at the positions that they have in the whole text. Judged are the nats of a
token of what goes on, and whether every token of the answer is the likeliest. Budgets are shares of the tokens; only
``hedge`` counts bytes, of which every row has its own (keys and values as they are held; for kvpress the tensors of its
cache, and AdaKV's masked keys count, for they are held). Differences to the full cache are paired by context.

Sliding-window layers are left alone by both. Presses act by their own ``forward_hook``.
"""

import argparse
import copy
import datetime
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

SHARES = (0.5, 0.25, 0.1)
OURS = (
    "random", "streaming_llm", "knorm", "keydiff", "snapkv", "pyramidkv", "pyramidkv:base=snapkv(window_size=8)",
    "adakv", "tova", "lagkv", "expected_attention", "hedge",
)  # fmt: skip
OF_OURS = {"window_size": 32, "kernel_size": 7}  # of snapkv, as in its paper; kvpress has 64 and 5
PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "RandomPress": lambda kv, drop: kv.RandomPress(compression_ratio=drop),
    "StreamingLLMPress": lambda kv, drop: kv.StreamingLLMPress(compression_ratio=drop),
    "KnormPress": lambda kv, drop: kv.KnormPress(compression_ratio=drop),
    "KeyDiffPress": lambda kv, drop: kv.KeyDiffPress(compression_ratio=drop),
    "SnapKVPress": lambda kv, drop: kv.SnapKVPress(compression_ratio=drop),
    "SnapKVPress(32, 7)": lambda kv, drop: kv.SnapKVPress(compression_ratio=drop, **OF_OURS),
    "PyramidKVPress": lambda kv, drop: kv.PyramidKVPress(compression_ratio=drop),
    "PyramidKVPress(8, 7)": lambda kv, drop: kv.PyramidKVPress(compression_ratio=drop, window_size=8, kernel_size=7),
    "TOVAPress": lambda kv, drop: kv.TOVAPress(compression_ratio=drop),
    "LagKVPress": lambda kv, drop: kv.LagKVPress(compression_ratio=drop),
    "ExpectedAttentionPress": lambda kv, drop: kv.ExpectedAttentionPress(compression_ratio=drop),
    "AdaKVPress(SnapKVPress)": lambda kv, drop: kv.AdaKVPress(kv.SnapKVPress(compression_ratio=drop)),
    "AdaKVPress(SnapKVPress(32, 7))": lambda kv, drop: kv.AdaKVPress(kv.SnapKVPress(compression_ratio=drop, **OF_OURS)),
    "AdaKVPress(ExpectedAttentionPress)": lambda kv, drop: kv.AdaKVPress(
        kv.ExpectedAttentionPress(compression_ratio=drop, epsilon=1e-2)
    ),
    "LeverageScorePress": lambda kv, drop: kv.LeverageScorePress(compression_ratio=drop),
    "CriticalKVPress(SnapKVPress)": lambda kv, drop: kv.CriticalKVPress(kv.SnapKVPress(compression_ratio=drop)),
}
PAIRS = (  # a press and what is here of the same name
    ("RandomPress", "random"), ("StreamingLLMPress", "streaming_llm"), ("KnormPress", "knorm"),
    ("KeyDiffPress", "keydiff"), ("SnapKVPress", "snapkv"), ("SnapKVPress(32, 7)", "snapkv"),
    ("PyramidKVPress", "pyramidkv"), ("PyramidKVPress(8, 7)", "pyramidkv:base=snapkv(window_size=8)"),
    ("TOVAPress", "tova"), ("LagKVPress", "lagkv"), ("ExpectedAttentionPress", "expected_attention"),
    ("AdaKVPress(SnapKVPress)", "adakv"), ("AdaKVPress(SnapKVPress(32, 7))", "adakv"),
)  # fmt: skip
Case = dict[str, Any]  # task, sample, text (a sum over its tokens), ids, fed, wanted
Found = list[dict[str, Any]]  # arm, task, sample, text, nats, right, bytes
FULL = "full (kvpress's transformers)"


def cases(model: str, text: str, length: int, samples: int, target: int, seed: int) -> list[Case]:
    """What both processes read: texts that go on, and contexts with one needle that is asked for afterwards."""
    from manyheads import models
    from manyheads.data.texts import corpus, is_code
    from manyheads.tasks.text._contexts import Contexts
    from manyheads.tasks.text._corpus import Corpus
    from manyheads.tasks.text._needles import CODE, PROSE

    tokenizer, texts = models.tokenizer(model), corpus(text)
    drawn = Contexts(
        Corpus(texts, tokenizer), tokenizer, samples, seed, wording=CODE if is_code(texts) else PROSE
    )  # fmt: skip
    made = []
    for i, (ids, _, _) in enumerate(drawn.plain("perplexity", length, samples, target)):
        row = ids.tolist()  # the last token of the context is fed after compression, so that all judged pass through it
        made.append({"task": "loss", "sample": i, "ids": row[: length - 1], "fed": row[length - 1 :], "wanted": target})
    for i, haystack in enumerate(drawn.single(length)):
        question = haystack.questions[0]
        made.append({
            "task": "needle", "sample": i, "ids": haystack.ids.tolist(),
            "fed": [*question.question, *question.answer], "wanted": len(question.answer),
        })  # fmt: skip
    for case in made:  # other numbers of samples draw other texts under the same number
        case["text"] = zlib.crc32(json.dumps([case["ids"], case["fed"]]).encode())
    return made


class Rows:
    """Rows of both processes in a file of JSON lines, the first of which says what was measured.

    Raises:
        SystemExit: the file is of other settings.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        if not path.exists():
            self._write([about])
        first, *rows = map(json.loads, path.read_text().splitlines())
        if first != about:
            raise SystemExit(f"{path} holds rows of {first}, not of {about}")
        self.rows: Found = rows
        self._known = {(row["arm"], row.get("text")) for row in rows}

    def has(self, arm: str, case: Case) -> bool:
        """Whether ``arm`` was measured on ``case``, or cannot be measured at all."""
        return bool({(arm, case["text"]), (arm, None)} & self._known)

    def add(self, rows: Found) -> None:
        """Append the rows of a case."""
        self._write(rows)
        self.rows += rows
        self._known |= {(row["arm"], row.get("text")) for row in rows}

    def _write(self, rows: Found) -> None:
        with self.path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def judged(logits: torch.Tensor, fed: torch.Tensor, wanted: int) -> tuple[float, bool]:
    """Nats of a token of the last ``wanted`` of ``fed [1, T]``, and whether all of them are the likeliest."""
    targets, seen = fed[0, -wanted:], logits[0, -wanted - 1 : -1].float()
    nats = torch.nn.functional.cross_entropy(seen, targets)
    return float(nats), bool((seen.argmax(-1) == targets).all())


@torch.inference_mode()
def ours(model: Any, arms: list[str], todo: list[Case], rows: Rows) -> None:
    """Every arm of manyheads on every case; one prefill serves those that compress after it."""
    import manyheads
    from manyheads.experiment import Arm
    from manyheads.tasks.text._prefill import Prefix, forward_chunked

    with manyheads.use(model):
        for case in todo:
            specs, found = [Arm(arm, arm) for arm in arms if not rows.has(arm, case)], []
            if not specs:
                continue
            ids, fed = (torch.tensor([case[name]], device=model.device) for name in ("ids", "fed"))
            prefix = Prefix(model, ids, specs)
            for arm in specs:
                with prefix.open(arm) as cache:
                    held = cache.bytes()
                    nats, right = judged(forward_chunked(model, cache, fed, fed.shape[1]), fed, case["wanted"])
                found.append({**_named(case), "arm": arm.name, "nats": nats, "right": right, "bytes": held})
            rows.add(found)
            print(".", end="", flush=True)


@torch.inference_mode()
def theirs(model: Any, shares: list[float], todo: list[Case], rows: Rows) -> None:
    """Every press on every case, and the full cache of this version of transformers; one prefill serves all."""
    import kvpress

    presses = {f"{name}:keep={share}": make(kvpress, 1 - share) for name, make in PRESSES.items() for share in shares}
    for press in presses.values():
        press.post_init_from_model(model)
    for case in todo:
        wanted = {name: press for name, press in {FULL: None, **presses}.items() if not rows.has(name, case)}
        if not wanted:
            continue
        ids, fed = (torch.tensor([case[name]], device=model.device) for name in ("ids", "fed"))
        torch.manual_seed(case["text"])  # two presses draw
        found, read = [], _read(model, ids, wanted)
        for name, (cache, masked, failed) in read.items():
            if failed:
                found.append({"arm": name, "task": "failed", "why": failed})
                continue
            held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
            for layer, indices in zip(model.model.layers, masked, strict=True):
                layer.self_attn.masked_key_indices = indices  # AdaKV's
            nats, right = judged(_go_on(model, cache, fed, ids.shape[1]), fed, case["wanted"])
            found.append({**_named(case), "arm": name, "nats": nats, "right": right, "bytes": held})
        rows.add(found)
        print(".", end="", flush=True)


def _read(model: Any, ids: torch.Tensor, presses: dict[str, Any]) -> dict[str, tuple[Any, list[Any], str]]:
    """For each press its cache, the keys that it masks in each layer, and why it failed.

    A press acts after a layer's attention, on what the layer has put into the cache: each gets that layer for itself.
    """
    from transformers import DynamicCache

    size = len(model.model.layers)
    caches = {name: DynamicCache(config=model.config) for name in presses}
    masked: dict[str, list[Any]] = {name: [None] * size for name in presses}
    failed = dict.fromkeys(presses, "")

    def act(module: Any, given: Any, kwargs: dict[str, Any], output: Any) -> None:
        at = module.layer_idx
        for name, press in presses.items():
            caches[name].layers[at] = copy.copy(kwargs["past_key_values"].layers[at])
            if press is None or failed[name] or getattr(module, "is_sliding", False):
                continue
            try:
                press.forward_hook(module, given, {**kwargs, "past_key_values": caches[name]}, output)
            except Exception as error:  # of a press that does not take this architecture: said in its row
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
            masked[name][at], module.masked_key_indices = getattr(module, "masked_key_indices", None), None

    hooks = []
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
        kind = getattr(layer.self_attn, "layer_type", None)  # Gemma 3 has a rotation for each kind; kvpress names none
        rotary = model.model.rotary_emb
        layer.self_attn.rotary_emb = partial(rotary, layer_type=kind) if kind else rotary
        hooks.append(layer.self_attn.register_forward_hook(act, with_kwargs=True))
    try:
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (caches[name], masked[name], failed[name]) for name in presses}


def _go_on(model: Any, cache: Any, fed: torch.Tensor, start: int) -> torch.Tensor:
    """Logits of ``fed [1, T]`` behind a cache, at positions from ``start``.

    Where layers that see everything hold as many keys as each other, T tokens go at once; a model with sliding layers
    is given both masks. Otherwise no mask serves all layers, and they go one by one, which needs none.
    """
    new = fed.shape[1]
    at = torch.arange(start, start + new, device=fed.device)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(cache.layers)
    held = {kind: {layer.keys.shape[2] for layer, k in zip(cache.layers, kinds, strict=True) if k == kind}
            for kind in set(kinds)}  # fmt: skip
    size = new if all(len(sizes) == 1 for sizes in held.values()) else 1
    masks = None
    if size > 1 and len(held) > 1:
        masks = {}
        for kind, (keys,) in held.items():
            apart = at[:, None] - (torch.arange(keys + new, device=fed.device) + start - keys)  # of a layer's last keys
            reach = model.config.sliding_window if kind == "sliding_attention" else start + new
            masks[kind] = ((apart >= 0) & (apart < reach))[None, None]
    pieces = zip(fed.split(size, 1), at[None].split(size, 1), strict=True)
    return torch.cat([
        model(input_ids=x, past_key_values=cache, position_ids=p, attention_mask=masks).logits for x, p in pieces
    ], 1)  # fmt: skip


def _named(case: Case) -> dict[str, Any]:
    return {name: case[name] for name in ("task", "sample", "text")}


def load(folder: str, device: str, dtype: str | None) -> Any:
    """The model as either version of transformers loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = getattr(torch, dtype) if dtype else "auto"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").to(device).eval()


def figures(found: Found, shares: list[float], only: str) -> dict[str, list[dict[str, Any]]]:
    """For each arm loss over the full cache of its own process, needles and bytes; and what pairs differ by.

    95 % intervals over contexts; differences are paired by context.
    """
    from manyheads.experiment.estimates import difference, estimate
    from manyheads.experiment.rows import Metric, Row

    metrics = {"loss": Metric("loss", "loss", "nats"), "needle": Metric("needle", "needle", higher=True, kind="share")}
    rows: dict[str, dict[str, list[Row]]] = {}
    made = [{"arm": one["arm"], "failed": one["why"]} for one in found if one["task"] == "failed"]
    for one in found:
        if one["task"] == "failed":
            continue
        value = one["nats"] if one["task"] == "loss" else float(one["right"])
        row = Row(task=one["task"], metric=one["task"], arm=one["arm"], value=value, sample=str(one["sample"]))
        rows.setdefault(one["arm"], {}).setdefault(one["task"], []).append(row)
    held = {arm: sum(one["bytes"] for one in found if one["arm"] == arm and one["task"] == "loss") for arm in rows}

    def apart(task: str, one: str, other: str) -> dict[str, Any]:
        return difference(rows[one][task], rows[other][task], metrics[task]).plain()

    for arm, mine in rows.items():
        base = FULL if "Press" in arm else "full"
        made.append({
            "arm": arm, "held": held[arm] / held["full"],
            "loss": estimate(mine["loss"], metrics["loss"]).plain(),
            "over_full": None if arm in (FULL, "full") else apart("loss", arm, base),
            "needle": estimate(mine["needle"], metrics["needle"]).plain(),
        })  # fmt: skip
    named = [(FULL, "full", None)]
    named += [
        (f"{press}:keep={share}", spec(mine, share, only), share) for share in shares for press, mine in PAIRS
    ]  # fmt: skip
    pairs = [
        {"press": press, "ours": mine, "share": share, **{task: apart(task, mine, press) for task in metrics}}
        for press, mine, share in named
        if press in rows and mine in rows
    ]
    return {"rows": made, "pairs": pairs}


def spec(name: str, share: float, only: str) -> str:
    """The spec of a strategy at a share of the tokens, on the layers that see everything."""
    return f"{name}{',' if ':' in name else ':'}budget={share}{only}"


def _shown(found: dict[str, Any] | None, digits: str) -> str:
    """A value and its interval; one context has none."""
    if found is None:
        return ""
    low, high = found["low"], found["high"]
    range_ = "" if low is None or high is None else f" [{low:{digits}}, {high:{digits}}]"
    return f"{found['value']:{digits}}{range_}"


def main() -> None:
    """Measure in both processes, print the table and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub name, known name or folder")
    parser.add_argument("--peer", type=Path, required=True, help="folder that holds kvpress and its transformers")
    parser.add_argument("--text", default="essays")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--target", type=int, default=64, help="tokens whose loss is judged")
    parser.add_argument("--shares", default=",".join(map(str, SHARES)))
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # where the second process finds the model
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="float32 or bfloat16; that of the checkpoint when not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file that takes the run, in place of one of this model and length")
    parser.add_argument("--rows", type=Path, help="file of rows: a run that was cut off, or gets more samples, goes on")
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)  # of the second process
    given = parser.parse_args()
    shares = [float(share) for share in given.shares.split(",")]
    about = {
        "model": given.model, "text": given.text, "length": given.length, "target": given.target,
        "dtype": given.dtype, "seed": given.seed,
    }  # fmt: skip
    if given.cases:
        model = load(given.folder, given.device, given.dtype)
        theirs(model, shares, json.loads(given.cases.read_text()), Rows(given.rows, about))
        return

    from manyheads.models import source

    folder = source(given.model)
    todo = cases(given.model, given.text, given.length, given.samples, given.target, given.seed)
    with tempfile.TemporaryDirectory() as place:
        passed, kept = Path(place) / "cases.json", given.rows or Path(place) / "rows.jsonl"
        passed.write_text(json.dumps(todo))
        command = [sys.executable, __file__, *sys.argv[1:], "--cases", passed, "--rows", kept, "--folder", folder]
        # The peer's folder comes first, so that its transformers is found before the installed one.
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(given.peer)})
        rows = Rows(kept, about)
        model = load(folder, given.device, given.dtype)
        kinds = getattr(model.config, "layer_types", None) or []
        sees_all = "+".join(str(i) for i, kind in enumerate(kinds) if kind == "full_attention")
        only = f",layers={sees_all}" if "sliding_attention" in kinds else ""
        arms = ["full", *(spec(name, share, only) for name in OURS for share in shares)]
        ours(model, arms, todo, rows)
    wanted = {FULL, *arms, *(f"{name}:keep={share}" for name in PRESSES for share in shares)}
    texts = {None, *(case["text"] for case in todo)}
    made = figures([row for row in rows.rows if row["arm"] in wanted and row.get("text") in texts], shares, only)
    show(made)
    if given.json:
        save(given.json, given.peer, {**about, "samples": given.samples, "dtype": str(model.dtype), **made})


def show(made: dict[str, list[dict[str, Any]]]) -> None:
    """Print the arms, and the pairs."""
    from rich.console import Console
    from rich.table import Table

    table = Table("arm", "held", "loss over full, nats", "needle, asked after")
    for row in made["rows"]:
        if "failed" in row:
            table.add_row(row["arm"], "", row["failed"], "")
            continue
        over = row["over_full"]
        table.add_row(row["arm"], f"{row['held']:.3f}", _shown(over, "+.3f"), _shown(row["needle"], ".2f"))
    pairs = Table("kvpress", "manyheads", "loss, ours - theirs", "needle, ours - theirs")
    for pair in made["pairs"]:
        pairs.add_row(pair["press"], pair["ours"], _shown(pair["loss"], "+.3f"), _shown(pair["needle"], "+.2f"))
    print()
    for each in (table, pairs):
        Console().print(each)


def save(path: Path, peer: Path, run: dict[str, Any]) -> None:
    """Put a run into the file, in place of one of the same model, text and length."""
    import importlib.metadata

    from manyheads.environment import commit, environment

    versions = {d.name: d.version for d in importlib.metadata.distributions(path=[str(peer)])}
    run = {
        "command": " ".join(["python", "benchmarks/peer_quality.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(), "commit": commit(), "environment": environment(),
        "peer": {name: versions.get(name) for name in ("kvpress", "transformers")}, **run,
    }  # fmt: skip
    names = ("model", "text", "length")
    stored = json.loads(path.read_text())["runs"] if path.exists() else []
    others = [other for other in stored if any(other[name] != run[name] for name in names)]
    path.write_text(json.dumps({"runs": [*others, run]}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
