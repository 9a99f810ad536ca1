# SPDX-License-Identifier: Apache-2.0
"""A cartridge trained on one document beside ``gist`` trained once on other text, at equal bytes.

    pip install peft    # 0.21 or later, for its CartridgeConfig
    python benchmarks/cartridge.py --json benchmarks/cartridge.json

A cartridge (Eyuboglu et al., "Cartridges", arXiv 2506.06266) is a cache of a few tokens, trained on the document that
it stands for; peft has the prefix and its start, keys and values of the document's first tokens. It is trained here by
distillation as in the paper, but without made-up questions: behind the cartridge the model has to predict spans of the
document as it does behind the whole document. It gets the processor seconds that the gists took, for every document
anew, and then as many as it needs: until ``--patience`` steps in a row lower the loss by less than 2 %. Gists are
trained on other files, and read a document once. Judged are the loss of the text behind the document, and of a constant
in the middle of it that is asked for.
"""

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import kl_div

LENGTH, BEHIND, SPAN = (
    576,
    64,
    96,
)  # tokens of a document and what follows it, of that, and of a span said again
Forward = Callable[[Tensor], Tensor]  # logits [B, T, V] of ids [B, T] behind a document


def judged(forward: Forward, following: Tensor, asked: Tensor, wanted: Tensor) -> dict[str, float]:
    """Nats a token of what follows, but for its first token, and of the answer."""

    def nats(ids: Tensor, last: int) -> float:
        logits = forward(ids[:, :-1])[:, -last:].float().log_softmax(-1)
        return float(-logits.gather(2, ids[:, -last:, None]).mean())

    return {"loss": nats(following, BEHIND - 1), "needle": nats(torch.cat([asked, wanted], 1), wanted.shape[1])}


def cartridges(
    model: Any, ids: Tensor, given: argparse.Namespace, seconds: float
) -> Iterator[tuple[str, Forward, float, int]]:
    """What it is, forward, seconds, steps: a cartridge of ``ids [1, N]``: at first, after ``seconds``, at last."""
    from peft import CartridgeConfig, get_peft_model, initialize_kv_prefix_from_past_key_values
    from transformers import DynamicCache

    count = ids.shape[1] // given.ratio
    with torch.no_grad():
        first = model(ids[:, :count], past_key_values=DynamicCache(config=model.config)).past_key_values
        said = torch.cat([ids[:, at : at + SPAN] for at in range(0, ids.shape[1] - SPAN + 1, SPAN // 3)])
        whole = torch.cat([ids.expand(len(said), -1), said], 1)
        target = torch.cat([model(rows).logits[:, -SPAN:].log_softmax(-1) for rows in whole.split(4)])
    made = get_peft_model(model, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=count, num_frozen_tokens=1))
    initialize_kv_prefix_from_past_key_values(made, past_key_values=[(x.keys, x.values) for x in first.layers])
    forward = lambda x: made(input_ids=x).logits[:, -x.shape[1] :]  # noqa: E731
    yield "cartridge, its start", forward, 0.0, 0
    optimizer = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=given.lr, weight_decay=0.0)
    generator, losses, n = torch.Generator().manual_seed(given.seed), [], given.patience
    spent, told = 0.0, False
    while spent < given.most:
        if told and len(losses) >= 2 * n and sum(losses[-n:]) > 0.98 * sum(losses[-2 * n : -n]):
            break
        start = time.process_time()
        rows = torch.randint(len(said), (4,), generator=generator)
        found = kl_div(forward(said[rows]).log_softmax(-1), target[rows], log_target=True, reduction="none")
        optimizer.zero_grad()
        loss = found.sum(-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        spent += time.process_time() - start
        if not told and spent >= seconds:
            told = True
            yield "cartridge, seconds of gist", forward, spent, len(losses)
    yield "cartridge, as long as it needs", forward, spent, len(losses)


def table(rows: list[Any], costs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A line for each arm: what it costs, its losses, and what these have more than those of gists."""
    from manyheads.experiment import estimates
    from manyheads.experiment.rows import Metric

    lines = []
    for arm, cost in costs.items():
        line: dict[str, Any] = {"arm": arm} | {name: float(np.mean([x[name] for x in cost])) for name in cost[0]}
        for name in ("loss", "needle"):
            metric = Metric(name, name, "nats/token")
            mine, gist = ([row for row in rows if (row.arm, row.metric) == (a, name)] for a in (arm, "gist"))
            line[name] = estimates.estimate(mine, metric).plain()
            if arm != "gist":
                line[f"{name}_less_gist"] = estimates.difference(mine, gist, metric).plain()
        lines.append(line)
    return lines


def main() -> None:
    """Train, judge, print, write."""
    from manyheads.caches.gist import Segments
    from manyheads.data.texts import standard_library
    from manyheads.environment import commit, environment
    from manyheads.experiment import Arm
    from manyheads.experiment.rows import Row
    from manyheads.files import write_atomically
    from manyheads.integrations import use
    from manyheads.models import load_default
    from manyheads.recipes._adapters import encoded, id_batches
    from manyheads.recipes.gist import train_gists
    from manyheads.tasks.text._contexts import Contexts
    from manyheads.tasks.text._corpus import Corpus
    from manyheads.tasks.text._prefill import Prefix, forward_chunked

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--ratio", type=int, default=4, help="tokens that a slot stands for")
    parser.add_argument("--gist-seconds", type=float, default=12.0, help="of the processor, once for all documents")
    parser.add_argument("--most", type=float, default=30.0, help="seconds of the processor, of a cartridge at most")
    parser.add_argument("--patience", type=int, default=12, help="steps that have to lower its loss by 2 %%")
    parser.add_argument("--lr", type=float, default=5e-3, help="of a cartridge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    (model, tokenizer), texts = load_default("cpu"), standard_library()
    contexts = Contexts(Corpus(texts[1::2], tokenizer), tokenizer, 3 * given.documents, given.seed)
    rows: list[Row] = []
    costs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        batches = id_batches(encoded(texts[0::2], tokenizer), LENGTH, 4, given.seed)
        train_gists(
            model, batches, segments=Segments(length=128, ratio=given.ratio), ae=1.0, budget="100000 steps",
            on_step=lambda state, _: time.process_time() - start > given.gist_seconds, seed=given.seed,
        ).save(Path(folder))  # fmt: skip
        trained, share = time.process_time() - start, 1 / given.ratio
        arms = [Arm("full"), Arm("gist", f"gist:gists={folder}"), Arm("hedge", "hedge:whole=0,bits=none", share),
                Arm("snapkv", "snapkv", share)]  # fmt: skip
        for number, context in enumerate(x for x in contexts.single(LENGTH) if x.questions[0].depth == 0.5):
            ids, question = torch.from_numpy(context.ids)[None], context.questions[0]
            asked, wanted = (torch.tensor([x]) for x in (question.question, question.answer))
            body, after = ids[:, : LENGTH - BEHIND], ids[:, LENGTH - BEHIND :]

            def note(name: str, forward: Forward, **cost: float) -> None:
                found = judged(forward, after, asked, wanted)  # noqa: B023
                at = {"sample": f"{number}", "task": "cartridge", "arm": name}  # noqa: B023
                rows.extend(Row(metric=metric, value=x, **at) for metric, x in found.items())
                costs.setdefault(name, []).append(cost)
                print(number, name, {k: round(x, 3) for k, x in {**found, **cost}.items()}, flush=True)  # noqa: B023

            for arm in arms:
                with torch.inference_mode(), use(model):
                    prefix = Prefix(model, body, [arm])

                    def behind(x: Tensor) -> Tensor:
                        with prefix.open(arm) as cache:  # noqa: B023
                            return forward_chunked(model, cache, x, x.shape[1])

                    with prefix.open(arm) as cache:
                        held = cache.bytes()
                    note(arm.name, behind, bytes=held, seconds=trained if arm.name == "gist" else 0.0, steps=0)
            size = costs["full"][-1]["bytes"] * (body.shape[1] // given.ratio) / body.shape[1]
            for name, forward, seconds, steps in cartridges(model, body, given, trained):
                with torch.no_grad():
                    note(name, forward, bytes=size, seconds=seconds, steps=steps)
    about = {
        "commit": commit(), "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "ratio": given.ratio,
        "environment": environment(), "length": LENGTH - BEHIND, "documents": given.documents, "gist_seconds": trained,
        "arms": table(rows, costs),
    }  # fmt: skip
    if given.json:
        write_atomically(given.json, json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
