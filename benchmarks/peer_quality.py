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
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

SHARES = (0.5, 0.25, 0.1)
OURS = (
    "random", "streaming_llm", "knorm", "keydiff", "snapkv", "pyramidkv", "adakv", "tova", "lagkv",
    "expected_attention", "hedge",
)  # fmt: skip
PRESSES: dict[str, Callable[[Any, float], Any]] = {
    "RandomPress": lambda kv, drop: kv.RandomPress(compression_ratio=drop),
    "StreamingLLMPress": lambda kv, drop: kv.StreamingLLMPress(compression_ratio=drop),
    "KnormPress": lambda kv, drop: kv.KnormPress(compression_ratio=drop),
    "KeyDiffPress": lambda kv, drop: kv.KeyDiffPress(compression_ratio=drop),
    "SnapKVPress": lambda kv, drop: kv.SnapKVPress(compression_ratio=drop),
    "PyramidKVPress": lambda kv, drop: kv.PyramidKVPress(compression_ratio=drop),
    "TOVAPress": lambda kv, drop: kv.TOVAPress(compression_ratio=drop),
    "LagKVPress": lambda kv, drop: kv.LagKVPress(compression_ratio=drop),
    "ExpectedAttentionPress": lambda kv, drop: kv.ExpectedAttentionPress(compression_ratio=drop),
    "AdaKVPress(SnapKVPress)": lambda kv, drop: kv.AdaKVPress(kv.SnapKVPress(compression_ratio=drop)),
    "AdaKVPress(ExpectedAttentionPress)": lambda kv, drop: kv.AdaKVPress(
        kv.ExpectedAttentionPress(compression_ratio=drop, epsilon=1e-2)
    ),
    "LeverageScorePress": lambda kv, drop: kv.LeverageScorePress(compression_ratio=drop),
    "CriticalKVPress(SnapKVPress)": lambda kv, drop: kv.CriticalKVPress(kv.SnapKVPress(compression_ratio=drop)),
}
Case = dict[str, Any]  # task, sample, ids, fed, wanted
Found = list[dict[str, Any]]  # arm, task, sample, nats, right, bytes


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
    return made


def judged(logits: torch.Tensor, fed: torch.Tensor, wanted: int) -> tuple[float, bool]:
    """Nats of a token of the last ``wanted`` of ``fed [1, T]``, and whether all of them are the likeliest."""
    targets, seen = fed[0, -wanted:], logits[0, -wanted - 1 : -1].float()
    nats = torch.nn.functional.cross_entropy(seen, targets)
    return float(nats), bool((seen.argmax(-1) == targets).all())


@torch.inference_mode()
def ours(model: Any, arms: list[str], todo: list[Case], told: Callable[[], None]) -> Found:
    """Every arm of manyheads on every case; one prefill serves those that compress after it."""
    import manyheads
    from manyheads.experiment import Arm
    from manyheads.tasks.text._prefill import Prefix, forward_chunked

    specs, found = [Arm(arm, arm) for arm in arms], []
    with manyheads.use(model):
        for case in todo:
            ids, fed = (torch.tensor([case[name]], device=model.device) for name in ("ids", "fed"))
            prefix = Prefix(model, ids, specs)
            for arm in specs:
                with prefix.open(arm) as cache:
                    held = cache.bytes()
                    nats, right = judged(forward_chunked(model, cache, fed, fed.shape[1]), fed, case["wanted"])
                found.append({**_named(case), "arm": arm.name, "nats": nats, "right": right, "bytes": held})
            told()
    return found


@torch.inference_mode()
def theirs(model: Any, shares: list[float], todo: list[Case], told: Callable[[], None]) -> Found:
    """Every press on every case, and the full cache of this version of transformers."""
    import kvpress
    from transformers import DynamicCache

    arms: list[tuple[str, Any]] = [("full (kvpress's transformers)", None)]
    arms += [(f"{name}:keep={share}", make(kvpress, 1 - share)) for name, make in PRESSES.items() for share in shares]
    found: Found = []
    failed: dict[str, str] = {}
    for case in todo:
        ids, fed = (torch.tensor([case[name]], device=model.device) for name in ("ids", "fed"))
        for name, press in arms:
            cache = DynamicCache(config=model.config)
            if name in failed:
                continue
            try:
                with _hooked(model, press):
                    model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            except Exception as error:  # of a press that does not take this architecture: said in its row
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
                continue
            held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
            at = torch.arange(ids.shape[1], ids.shape[1] + fed.shape[1], device=model.device)[None]
            # Layers of unequal length share no mask: token by token none is needed.
            uneven = len({layer.keys.shape[2] for layer in cache.layers}) > 1
            pieces = zip(*(x.split(1 if uneven else fed.shape[1], 1) for x in (fed, at)), strict=True)
            logits = torch.cat([model(input_ids=x, past_key_values=cache, position_ids=p).logits for x, p in pieces], 1)
            nats, right = judged(logits, fed, case["wanted"])
            for layer in model.model.layers:
                layer.self_attn.masked_key_indices = None
            found.append({**_named(case), "arm": name, "nats": nats, "right": right, "bytes": held})
        told()
    return [*found, *({"arm": name, "task": "failed", "why": why} for name, why in failed.items())]


@contextmanager
def _hooked(model: Any, press: Any) -> Iterator[None]:
    """A press on the layers that see everything, as its own context manager puts it on."""
    if press is None:
        yield
        return
    press.post_init_from_model(model)
    hooks = []
    for layer in model.model.layers:
        if not getattr(layer.self_attn, "is_sliding", False):
            layer.self_attn.rotary_emb = model.model.rotary_emb
            hooks.append(layer.self_attn.register_forward_hook(press.forward_hook, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _named(case: Case) -> dict[str, Any]:
    return {name: case[name] for name in ("task", "sample")}


def load(folder: str, device: str, dtype: str | None) -> Any:
    """The model as either version of transformers loads it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind = getattr(torch, dtype) if dtype else "auto"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").to(device).eval()


def figures(found: Found) -> list[dict[str, Any]]:
    """For each arm: loss over the full cache of its own process, needles, bytes; 95 % intervals over contexts."""
    from manyheads.experiment.estimates import difference, estimate
    from manyheads.experiment.rows import Metric, Row

    loss, needle = Metric("loss", "loss", "nats"), Metric("needle", "needle", higher=True, kind="share")
    rows: dict[str, dict[str, list[Row]]] = {}
    made = [{"arm": one["arm"], "failed": one["why"]} for one in found if one["task"] == "failed"]
    for one in found:
        if one["task"] == "failed":
            continue
        value = one["nats"] if one["task"] == "loss" else float(one["right"])
        row = Row(task=one["task"], metric=one["task"], arm=one["arm"], value=value, sample=str(one["sample"]))
        rows.setdefault(one["arm"], {}).setdefault(one["task"], []).append(row)
    held = {arm: [one["bytes"] for one in found if one["arm"] == arm and one["task"] == "loss"] for arm in rows}
    for arm, mine in rows.items():
        base = "full (kvpress's transformers)" if "Press" in arm else "full"
        same = arm == base
        made.append({
            "arm": arm, "held": sum(held[arm]) / sum(held["full"]), "loss": estimate(mine["loss"], loss).plain(),
            "over_full": None if same else difference(mine["loss"], rows[base]["loss"], loss).plain(),
            "needle": estimate(mine["needle"], needle).plain(),
        })  # fmt: skip
    return made


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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="float32 or bfloat16; that of the checkpoint when not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", type=Path, help=argparse.SUPPRESS)  # of the second process: cases in, rows out
    given = parser.parse_args()
    shares = [float(share) for share in given.shares.split(",")]
    if given.cases:
        todo = json.loads(given.cases.read_text())
        model = load(given.model, given.device, given.dtype)
        given.cases.write_text(json.dumps(theirs(model, shares, todo, lambda: print(".", end="", flush=True))))
        return

    from rich.console import Console
    from rich.table import Table

    from manyheads.environment import commit, environment
    from manyheads.models import source

    folder = source(given.model)
    todo = cases(given.model, given.text, given.length, given.samples, given.target, given.seed)
    with tempfile.TemporaryDirectory() as place:
        passed = Path(place) / "cases.json"
        passed.write_text(json.dumps(todo))
        command = [
            sys.executable, __file__, "--peer", str(given.peer), "--cases", str(passed), "--model", folder,
            "--device", given.device, "--shares", given.shares, *(["--dtype", given.dtype] if given.dtype else []),
        ]  # fmt: skip
        # The folder comes first, so that its transformers is found before the installed one.
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(given.peer)})
        found = json.loads(passed.read_text())
    model = load(folder, given.device, given.dtype)
    kinds = getattr(model.config, "layer_types", None) or []
    sees_all = "+".join(str(i) for i, kind in enumerate(kinds) if kind == "full_attention")
    only = f",layers={sees_all}" if "sliding_attention" in kinds else ""
    arms = ["full", *(f"{name}:budget={share}{only}" for name in OURS for share in shares)]
    found += ours(model, arms, todo, lambda: print(".", end="", flush=True))
    rows = figures(found)
    table = Table("arm", "held", "loss over full, nats", "needle, asked after")
    for row in rows:
        if "failed" in row:
            table.add_row(row["arm"], "", row["failed"], "")
            continue
        over = row["over_full"]
        table.add_row(row["arm"], f"{row['held']:.3f}", _shown(over, "+.3f"), _shown(row["needle"], ".2f"))
    print()
    Console().print(table)
    if given.json:
        import importlib.metadata

        versions = {d.name: d.version for d in importlib.metadata.distributions(path=[str(given.peer)])}
        about = {
            "command": " ".join(["python", "benchmarks/peer_quality.py", *sys.argv[1:]]), "model": given.model,
            "text": given.text, "length": given.length, "samples": given.samples, "dtype": str(model.dtype),
            "date": datetime.date.today().isoformat(), "commit": commit(), "environment": environment(),
            "peer": {name: versions.get(name) for name in ("kvpress", "transformers")}, "rows": rows,
        }  # fmt: skip
        given.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
