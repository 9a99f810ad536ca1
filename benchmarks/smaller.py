# SPDX-License-Identifier: Apache-2.0
"""Every conversion on published models: loss and RULER, with and without training, bytes, and time.

    python benchmarks/smaller.py --model smollm2-135m-instruct --model gemma3-270m --device cuda --seconds 1 \
        --json benchmarks/smaller.json

Conversions of a whole model are asked for the largest with at most a share of its parameters; those of attention keep
that share of its projections (``masa``, ``low_rank``) or of the cache (``mha2mla``, ``kv_merging``), as a row says. All
are calibrated on the same windows of WikiText-2; losses are of its last tenth, which nothing else reads, as intervals
over windows. With ``--seconds`` each is trained afterwards for as long, as it says itself. RULER is the share of
needles found (niah_single_1) by greedy decoding; ``dijiang`` leaves no attention to ask through. Nothing is chosen by
what was measured.

Rows are written to ``--out`` as they come, each with its commit, date and machine, so that a call that was cut off goes
on, and with ``--limit`` it stops by itself after so many seconds; give each model a GPU of its own. Under the clock a
row and the whole model take turns; on a CPU nothing is timed. What refuses a model says why. Of others' tools torch-
pruning takes part where it is installed (``pip install torch-pruning``, or its folder on PYTHONPATH); modelopt prunes
language models of Megatron-Core alone, and none of transformers.
"""

import argparse
import copy
import datetime
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

KEEP = (0.8, 0.7)
PARTS: tuple[Literal["mlp", "block"], ...] = ("mlp", "block")
MODEL, PROJECTIONS, CACHE = "model", "projections of attention", "cache"
WAYS = {
    "minitron: neurons": (MODEL, "minitron:keep={keep},axis=neurons"),
    "minitron: width and neurons": (MODEL, "minitron:keep={keep},axis=both"),
    "minitron: layers": (MODEL, "minitron:keep={keep},axis=layers"),
    "amp: heads and neurons": (MODEL, "amp:keep={keep}"),
    "amp, refit": (MODEL, "amp:keep={keep},refit=true"),
    "Wanda's score: neurons": (MODEL, "structured_pruning:keep={keep},axis=neurons"),
    "Wanda's score: neurons, refit": (MODEL, "structured_pruning:keep={keep},axis=neurons,refit=true"),
    "LLM-Pruner's score: heads and neurons": (MODEL, "structured_pruning:keep={keep},axis=heads_neurons,score=taylor"),
    "at random: neurons": (MODEL, "structured_pruning:keep={keep},axis=neurons,score=random"),
    "skip_attn: deepest feed-forward parts": (MODEL, "skip_attn:part=mlp,skip={mlp}"),
    "skip_attn: feed-forward parts by cosine": (MODEL, "skip_attn:part=mlp,skip={mlp},choose=cosine"),
    "skip_attn: deepest blocks": (MODEL, "skip_attn:part=block,skip={block}"),
    "skip_attn: blocks by cosine": (MODEL, "skip_attn:part=block,skip={block},choose=cosine"),
    "masa": (PROJECTIONS, "masa:keep={keep}"),
    "low_rank: whitened SVD": (PROJECTIONS, "low_rank:keep={keep}"),
    "comcat": (PROJECTIONS, "comcat:keep={keep}"),
    "mha2mla": (CACHE, "mha2mla:keep={keep}"),
    "kv_merging: one head": (CACHE, "kv_merging"),
    "dijiang": (CACHE, "dijiang"),
}
TORCH_PRUNING, MODELOPT = "torch-pruning: neurons by magnitude", "modelopt: minitron"
_WARM, _BATCH = 2, 4


def skipped(model: Any, part: Literal["mlp", "block"], keep: float) -> float | None:
    """The smallest share of layers without which no more than ``keep`` of the parameters are left; None: too many."""
    from manyheads.conversion import Drop, SurgeryPlan
    from manyheads.integrations.anatomy import ModelAnatomy

    anatomy = ModelAnatomy(model)
    layers = len(anatomy.layers)
    for count in range(1, layers):
        plan = SurgeryPlan((Drop(part=part, layers=tuple(range(layers - count, layers))),))
        if anatomy.parameters(plan) <= keep * anatomy.parameters():
            return round(count / layers, 4)
    return None


def torch_pruned(model: Any, keep: float) -> Any:
    """A copy without the neurons whose weights are smallest, as torch-pruning traces and groups them.

    Raises:
        ImportError: it is not there.
        ValueError: so few parameters cannot be had by neurons.
    """
    import torch
    import torch_pruning as tp

    made = copy.deepcopy(model)
    blocks = made.base_model.layers
    inside = sum(p.numel() for block in blocks for p in block.mlp.parameters())
    part = (1 - keep) * sum(p.numel() for p in made.parameters()) / inside
    if part >= 1:
        raise ValueError("without all neurons more is left")
    first = {id(module) for block in blocks for module in (block.mlp.gate_proj, block.mlp.up_proj)}
    kept = [m for m in made.modules() if isinstance(m, torch.nn.Linear | torch.nn.Embedding) and id(m) not in first]
    uses, made.config.use_cache = made.config.use_cache, False
    ids = torch.arange(16, device=made.device)[None]
    pruner = tp.pruner.BasePruner(
        made, example_inputs=ids, importance=tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean"),
        pruning_ratio=part, ignored_layers=kept, global_pruning=False, round_to=8,
    )  # fmt: skip
    pruner.step()
    made.config.use_cache = uses
    return made.eval()


class Table:
    """The rows of one model.

    Args:
        given: the options of the command.
        name: of the model.
        base: losses of the whole model by window, where they are known.
    """

    def __init__(self, given: argparse.Namespace, name: str, base: list[float]) -> None:
        import torch

        from manyheads import models
        from manyheads.converter import Material
        from manyheads.data.texts import corpus

        self.given, self.name, self.base = given, name, base
        self.model, self.tokenizer = models.load(name, given.device, torch.float32)
        self.material = Material.of(corpus("prose"), self.tokenizer, given.length, given.windows)

    def rows(self) -> Iterator[tuple[dict[str, Any], Callable[[dict[str, Any]], None]]]:
        """Each row as far as it is known beforehand, and what measures the rest of it; the whole model first."""
        yield {"way": "the whole model", "keep": 1.0}, self._whole
        for keep in KEEP:
            shares = {part: skipped(self.model, part, keep) for part in PARTS}
            for way, (of, spec) in WAYS.items():
                row = {"way": way, "keep": keep, "of": of}
                lacks = [part for part in PARTS if f"{{{part}}}" in spec and shares[part] is None]
                if lacks:
                    yield row | {"says": f"without all {lacks[0]} parts more is left"}, lambda _: None
                else:
                    yield row, partial(self._converted, spec.format(keep=keep, **shares))
            yield {"way": TORCH_PRUNING, "keep": keep, "of": MODEL}, self._others
        yield {"way": MODELOPT, "says": "prunes language models of Megatron-Core alone"}, lambda _: None

    def _whole(self, row: dict[str, Any]) -> None:
        row["losses"] = self.base = self._judged(row, self.model)

    def _converted(self, spec: str, row: dict[str, Any]) -> None:
        from manyheads.converter import as_conversion, calibrated
        from manyheads.errors import UserError
        from manyheads.integrations.anatomy import ModelAnatomy

        try:
            strategy = as_conversion(spec)
            batches = self.material.calibration(self.given.sequences, _BATCH, self.given.device)
            made, _ = calibrated(self.model, strategy, batches)
        except UserError as error:
            row["says"] = str(error)
            return
        row["spec"] = strategy.spec
        self._judged(row, made, strategy.recovery(ModelAnatomy(self.model)))

    def _others(self, row: dict[str, Any]) -> None:
        from manyheads.conversion import Recovery

        try:
            self._judged(row, torch_pruned(self.model, row["keep"]), Recovery())
        except ImportError:
            row["says"] = "not installed"
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            row["says"] = f"fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}"

    def _judged(self, row: dict[str, Any], model: Any, how: Any = None) -> list[float]:
        """Put into ``row`` what a model is worth, and after training; its losses by window."""
        from manyheads.training.budget import Budget
        from manyheads.training.recovery import recover

        size = sum(p.numel() for p in model.parameters())
        row["parameters"] = size / sum(p.numel() for p in self.model.parameters())
        row["weights"] = sum(p.nbytes for p in model.parameters()) / 2**20
        losses = self._measured(row, model, "")
        if self.given.device != "cpu":
            self._timed(row, model)
        if how is not None and self.given.seconds:
            student = copy.deepcopy(model)
            get_batch = self.material.batches(how.batch, 0, self.given.device)
            state = recover(student, self.model, get_batch, Budget(self.given.seconds, "seconds"), how)
            row["steps"] = state.step
            self._measured(row, student, "_trained")
        return losses

    def _measured(self, row: dict[str, Any], model: Any, when: str) -> list[float]:
        from manyheads.converter import measured
        from manyheads.errors import UserError
        from manyheads.experiment import Arm, CausalLM, Metric, Row, RunContext
        from manyheads.experiment.estimates import difference
        from manyheads.tasks.text.ruler.niah_single_1 import NiahSingle1

        losses = measured(model, self.model, self.material)
        row[f"token_nll{when}"] = sum(losses) / len(losses)
        if self.base:
            mine, theirs = (
                [
                    Row(task="loss", metric="token_nll", arm=arm, value=x, sample=f"{i}", context=f"{i}")
                    for i, x in enumerate(values)
                ]
                for arm, values in ((f"{row['way']}{row['keep']}{when}", losses), ("base", self.base))
            )
            more = difference(mine, theirs, Metric("token_nll", "loss"))
            row[f"token_nll{when}_more"] = {"value": more.value, "low": more.low, "high": more.high}
        import torch

        context = RunContext(
            CausalLM(self.name, model, self.tokenizer), (Arm("it"),), device=torch.device(self.given.device)
        )
        task = NiahSingle1(lengths=(self.given.context,), samples=self.given.needles, reply=16)
        try:
            hits = [r.value for unit in task.units(context) for r in task.measure(context, unit) if r.metric == "found"]
        except UserError:  # no attention is left that the task could be asked through: dijiang
            return losses
        row[f"ruler{when}"] = sum(hits) / len(hits)
        return losses

    def _timed(self, row: dict[str, Any], model: Any) -> None:
        """Time of a prompt and a token behind it, medians of rounds in turns with the whole model; bytes of a cache."""
        from statistics import median

        from transformers import DynamicCache

        from manyheads.tasks.text.converted_speed import held_bytes

        ids = self.material.train[: self.given.prompt + _WARM + self.given.written][None].to(self.given.device)
        prompts: dict[bool, list[float]] = {True: [], False: []}
        tokens: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(self.given.rounds + 1):  # the first is not counted
            for whole, it in ((True, self.model), (False, model)):
                cache = DynamicCache(config=it.config)
                prompt = seconds(lambda m=it, c=cache: m(ids[:, : self.given.prompt], past_key_values=c))
                each = [
                    seconds(lambda m=it, c=cache, t=token: m(t, past_key_values=c))
                    for token in ids[:, self.given.prompt :].split(1, 1)
                ]
                if turn:
                    prompts[whole].append(prompt)
                    tokens[whole].append(median(each[_WARM:]))
        row["cache"] = held_bytes(cache) / 2**20
        row |= {"prefill": median(prompts[False]), "tokens_per_second": 1 / median(tokens[False])}
        row["speed"] = median(tokens[True]) / median(tokens[False])


def seconds(call: Callable[[], Any]) -> float:
    """That a call takes on the GPU."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(given: argparse.Namespace, name: str, until: float) -> list[dict[str, Any]]:
    """The rows of a model as far as time allows; they are kept line by line, and none is measured twice."""
    place = given.out / f"{Path(name).name.lower()}.jsonl"
    found = [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []
    done = {(row["way"], row.get("keep")) for row in found}
    from manyheads.environment import commit, environment

    table = Table(given, name, next((row["losses"] for row in found if "losses" in row), []))
    with place.open("a") as journal:
        for row, work in table.rows():
            if (row["way"], row.get("keep")) in done:
                continue
            if time.perf_counter() > until:
                print(f"{name}: time is up; the same call goes on from --out")
                break
            work(row)
            row |= {"commit": commit(), "date": datetime.date.today().isoformat(), "environment": environment()}
            found.append(row)
            journal.write(json.dumps(row) + "\n")
            journal.flush()
            print({k: v for k, v in row.items() if not isinstance(v, dict | list)}, flush=True)
    return [{k: v for k, v in row.items() if k != "losses"} for row in found]


def main() -> None:
    """Measure all models, print, and write their figures into the file."""
    from manyheads.environment import commit, environment
    from manyheads.files import write_atomically

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="hub name, known name or folder; may repeat")
    parser.add_argument("--seconds", type=float, default=0, help="of the training of each; 0 for none")
    parser.add_argument("--windows", type=int, default=32, help="that losses are of")
    parser.add_argument("--sequences", type=int, default=32, help="of the calibration")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--context", type=int, default=512, help="tokens of RULER's contexts")
    parser.add_argument("--needles", type=int, default=16, help="of RULER's contexts")
    parser.add_argument("--prompt", type=int, default=512, help="tokens that are read under the clock")
    parser.add_argument("--written", type=int, default=8, help="tokens that are written under the clock")
    parser.add_argument("--rounds", type=int, default=3, help="of the clock")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("smaller"), help="folder of the rows of each model")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no row begins")
    parser.add_argument("--json", type=Path, help="file to put the figures into")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    until = time.perf_counter() + given.limit
    for name in given.model or ["smollm2-135m-instruct"]:
        rows = measure(given, name, until)
        if given.json:
            kept = json.loads(given.json.read_text())["runs"] if given.json.exists() else {}
            sizes = {k: v for k, v in vars(given).items() if isinstance(v, int | float) and k != "limit"}
            kept[f"{Path(name).name.lower()}, {given.device}"] = {
                "command": " ".join(["python", "benchmarks/smaller.py", *sys.argv[1:]]), "commit": commit(),
                "date": datetime.date.today().isoformat(), "environment": environment(), "text": "prose", **sizes,
                "rows": rows,
            }  # fmt: skip
            write_atomically(given.json, json.dumps({"runs": kept}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
