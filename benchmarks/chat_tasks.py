# SPDX-License-Identifier: Apache-2.0
"""Do the chat tasks tell something of a small model? Choices by likelihood with the whole cache, and with another's.

    python benchmarks/chat_tasks.py --model HuggingFaceTB/SmolLM2-135M-Instruct --json benchmarks/chat_tasks.json

The same questions are asked of the context that they are about and, as a control, of the context of another sample:
there nothing can be known, and the share of right choices has to be the floor. Of system prompts every second control
has the same order on secrecy and every second the contrary. In the same run the written replies to the four questions
of one passage are timed, in one batch and one after the other, in turns, from the same cache.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

SAMPLES = {"chat.qa": 12, "chat.multi_turn": 12, "chat.instructions": 24, "chat.system_prompt": 24}
OWN, OTHER = "own", "another"


def with_control(name: str) -> Any:
    """The task with every question put to two contexts."""
    from manyheads.tasks import load

    kind: Any = load(name)

    def about(query: Any, context: str) -> Any:
        """The query without a written reply, its rows marked, and a prior of its own."""
        choices = tuple(
            dataclasses.replace(
                one, prior=one.prior and f"{one.prior}, {context}", at={**one.at, "context": context}
            )
            for one in query.choices
        )  # fmt: skip
        return dataclasses.replace(query, judges=(), choices=choices)

    class Controlled(kind):  # type: ignore[misc]
        def asked(self, run: Any, length: int, sample: int) -> list[Any]:
            mine = kind.asked(self, run, length, sample)
            other = kind.asked(self, run, length, sample + (1 if sample % 4 < 2 else 2))
            made = [
                dataclasses.replace(one, queries=tuple(about(query, context) for query in one.queries))
                for context, those in ((OWN, mine), (OTHER, other)) for one in those if one.plain
            ]  # fmt: skip
            for one, control in zip(mine, other, strict=True):
                if not one.plain:
                    queries = [about(query, OWN) for query in one.queries]
                    queries += [about(query, OTHER) for query in control.queries]
                    made.append(dataclasses.replace(one, queries=tuple(queries)))
            return made

    Controlled.__module__ = kind.__module__
    return dataclasses.dataclass(frozen=True, kw_only=True)(Controlled)


def measured(run: Any, name: str, samples: int) -> list[dict[str, Any]]:
    """Share of right choices by metric and context, with the metric's floor."""
    from manyheads.experiment.estimates import estimate

    task = with_control(name)(samples=samples, reply=0)
    rows = []
    for unit in task.units(run):
        rows += list(task.measure(run, unit))
        print(unit.key, file=sys.stderr, flush=True)
    found = []
    for metric in task.metrics:
        for context in (OWN, OTHER):
            some = [row for row in rows if row.metric == metric.name and row.at["context"] == context]
            if some:
                found.append({
                    "task": name, "metric": metric.name, "context": context, "floor": metric.floor,
                    "tokens": task.lengths[0], "estimate": estimate(some, metric).plain(),
                })  # fmt: skip
    return found


def batched(run: Any, rounds: int, tokens: int) -> dict[str, Any]:
    """Seconds of four replies of so many tokens together and one by one, medians, and the ratio of each round."""
    from manyheads.integrations import use
    from manyheads.integrations.decoding import greedy, greedy_rows
    from manyheads.tasks import load
    from manyheads.tasks.text._answered import tokens as encoded
    from manyheads.tasks.text._prefill import Prefix
    from manyheads.tasks.text._text_task import tensor

    model = run.subject.model
    (asked,) = load("chat.qa")().asked(run, 512, 0)  # type: ignore[attr-defined]
    tails = [encoded(run, query.tail) for query in asked.queries]
    together, alone = [], []
    with torch.inference_mode(), use(model):
        prefix = Prefix(model, tensor(run, [encoded(run, asked.heads[0], first=True)]), run.arms)
        with prefix.open(run.baseline) as cache:
            for _ in range(rounds):
                start = time.perf_counter()
                twin = copy.deepcopy(cache)
                twin.batch_repeat_interleave(len(tails))
                one = greedy_rows(model, twin, tails, [tokens] * len(tails))
                between = time.perf_counter()
                other = [greedy(model, copy.deepcopy(cache), tensor(run, [tail]), tokens) for tail in tails]
                together.append(between - start)
                alone.append(time.perf_counter() - between)
    ratios = [b / a for a, b in zip(together, alone, strict=True)]
    return {
        "questions": len(tails), "tokens": tokens, "rounds": rounds, "together_s": statistics.median(together),
        "alone_s": statistics.median(alone), "ratio": statistics.median(ratios), "least": min(ratios),
        "most": max(ratios), "same_replies": one == other,
    }  # fmt: skip


def main() -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--share", type=float, default=1.0, help="of the samples")
    parser.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    from manyheads import models
    from manyheads.environment import commit, environment
    from manyheads.experiment import Arm, CausalLM
    from manyheads.experiment.task import RunContext

    if given.device == "cpu":
        torch.set_num_threads(1)
    model, tokenizer = models.load(given.model, given.device, models.named_dtype(given.dtype))
    run = RunContext(CausalLM("model", model, tokenizer), (Arm("full"),), device=torch.device(given.device))
    timed = batched(run, 5, 24)
    rows = [row for name, n in SAMPLES.items() for row in measured(run, name, max(2, round(given.share * n)))]
    document = {
        "command": "python " + " ".join(sys.argv), "model": given.model, "dtype": given.dtype,
        "date": datetime.date.today().isoformat(), "commit": commit(),
        "environment": environment(), "batch": timed, "rows": rows,
    }  # fmt: skip
    given.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
