# SPDX-License-Identifier: Apache-2.0
"""``manyheads doctor`` in Python: all that is measured; what it means is in :mod:`manyheads.inspect.checks`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data.texts import Text, standard_library
from ..errors import UserError
from ..heads import HeadTable
from ..integrations import use
from ..lens import LensResult, device_of
from ..progress import Progress
from ..spec import parse
from .attention_breakdown import FIRST, AttentionBreakdown, HeadOutputNorm
from .checks import HealthCheck, evaluate
from .measures import Measures
from .prompts import SHORTEST, Prompt, draw
from .run import SAMPLES, describe, document_of, max_context, mean_loss, plain_values, read_prompts, reading, token_nll

__all__ = ["Diagnosis", "diagnose", "duplicate_heads", "padding"]

_MAP = 64  # cells on a side of the maps by which heads are compared
_SINGLE = 128  # heads at most of which each is ablated alone
_SCORED = 128  # tokens whose loss is compared over contexts
_ROOM = {"cpu": 4096, "cuda": 16384}  # tokens of the longest context, before those that are scored


@dataclass(frozen=True)
class Diagnosis:
    """What is unusual.

    Attributes:
        run: model, settings, texts and versions, fit for JSON.
        checks: what was looked for, the most pressing first.
        measures: the figures behind them.
    """

    run: dict[str, Any]
    checks: list[HealthCheck]
    measures: Measures

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return mean_loss(self.measures.losses)

    def document(self) -> dict[str, Any]:
        """All of it, fit for JSON; NaN becomes null."""
        m = self.measures
        return {
            "run": self.run, "loss": plain_values(self.loss),
            "checks": [plain_values(vars(check)) for check in self.checks],
            "findings": {name: document_of(found) for name, found in m.found.items()},
            "heads ablated alone": None if m.alone is None else m.alone.to_dict(),
            "contexts": {"tokens": m.contexts[0], "losses": plain_values(m.contexts[1])},
            "padding": plain_values(m.padding), "max_context": m.max_context,
        }  # fmt: skip


def diagnose(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text] | None = None,
    *,
    prompts: Sequence[Prompt] | None = None,
    length: int | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    quick: bool = False,
    origin: str | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Diagnosis:
    """Look for what is unusual in a model.

        from manyheads.inspect.doctor import diagnose

        for check in diagnose(*manyheads.models.load_default()).checks:
            print(check.level, check.title, check.figure)

    Args:
        model: a causal language model of transformers, in evaluation mode, on the device to use.
        tokenizer: its tokenizer.
        texts: what to read, the standard library's source when None.
        prompts: what to read in place of texts, as a chat; loss by length of context is that of its text.
        length: tokens of a prompt; 1,024 as far as model and text have so many when None.
        samples: prompts.
        seed: of all draws.
        quick: fewer heads ablated alone, shorter contexts.
        origin: what the model is called.
        command: what was typed.
        progress: called with how far the run is.

    Raises:
        UserError: anything that the caller can mend.
    """
    begun, say = time.perf_counter(), progress or (lambda done, total, message: None)
    if prompts is not None:
        texts = [Text(prompt.name, tokenizer.decode(prompt.ids)) for prompt in prompts]
    read = list(standard_library() if texts is None else texts)
    if length is not None and length < 4 * SHORTEST:
        raise UserError(f"the doctor needs prompts of {4 * SHORTEST} tokens or more; give a longer --length")
    if prompts is None:
        prompts = draw(read, tokenizer, length, samples, seed, max_context=max_context(model))
    prompts = [Prompt(prompt.ids[: length or max_context(model)], prompt.name, prompt.roles) for prompt in prompts]
    if len(prompts[0].ids) < 4 * SHORTEST:
        raise UserError(f"the text is too short: the doctor needs {4 * SHORTEST} tokens or more; give more text")
    made = Measures(
        max_context=max_context(model), groups=_groups(model), dtype=str(next(model.parameters()).dtype).split(".")[-1]
    )
    papers = ("active_dormant", "massive_values", "refined_massive_activations")
    lenses: list[Any] = [*(parse(slug) for slug in papers), AttentionBreakdown(size=_MAP), HeadOutputNorm()]
    found, made.losses = read_prompts(model, prompts, lenses, lambda i, m: say(i, 4 * len(prompts), m))
    made.found = dict(zip([*papers, "attention", "body"], found, strict=True))
    made.head_distance, made.most_similar = duplicate_heads(made.found["attention"])
    made.weights = {
        name: count
        for name, p in model.named_parameters()
        if p.device.type != "meta" and (count := int((~torch.isfinite(p)).sum().item()))
    }
    made.unread = sum(p.device.type == "meta" for p in model.parameters())
    say(2, 6, "padding")
    made.padding = padding(model, tokenizer, prompts[0])
    say(3, 6, "contexts of several lengths")
    made.contexts, made.refused = _contexts(model, tokenizer, read, seed, quick)
    made.alone = _alone(model, made, prompts[0], quick, say)
    say(1, 1, "")
    run = describe(model, prompts, read, origin, command)
    run["settings"] = {
        "length": max(len(p.ids) for p in prompts), "samples": len(prompts), "seed": seed, "quick": quick,
        "device": str(device_of(model)),
    }  # fmt: skip
    run["seconds"] = round(time.perf_counter() - begun, 2)
    return Diagnosis(run, evaluate(made), made)


def _groups(model: nn.Module) -> int:
    """Query heads to a key head."""
    config: Any = getattr(model, "config", None)
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    return max(1, heads // int(getattr(config, "num_key_value_heads", None) or heads))


def duplicate_heads(own: LensResult) -> tuple[Any, Any]:
    """Distance of each head's attention from that of the most similar head of its layer, 0 to 1, and which that is.

    Total variation between the rows of their pooled maps, mean over rows; NaN for a head without another.
    """
    first = own.tables[FIRST]
    _, count, heads = first.values.shape
    distance, most_similar = np.full((count, heads), np.nan), np.full((count, heads), -1)
    for row in range(count):
        maps = {head: own.maps[row, head] for head in range(heads) if (row, head) in own.maps}
        share = {h: m / np.maximum(m.sum(-1, keepdims=True), 1e-30) for h, m in maps.items()}
        for head, mine in share.items():
            others = {h: float(0.5 * np.abs(mine - other).sum(-1).mean()) for h, other in share.items() if h != head}
            if others:
                most_similar[row, head] = min(others, key=lambda h: others[h])
                distance[row, head] = others[most_similar[row, head]]
    return distance, most_similar


def padding(model: Any, tokenizer: Any, prompt: Prompt) -> dict[str, dict[str, float]]:
    """What padding does to the logits of a short row that is read with a longer one.

    Returns:
        For ``none`` (beside an equally long row: what a batch alone changes), ``right``, ``left`` (position ids counted
        from the first token, as ``generate`` does) and ``left, no position ids``: ``change``, greatest difference of a
        logit over their standard deviation, and ``choices``, share of positions where another token is likeliest.
    """
    short = prompt.ids[: min(48, len(prompt.ids) // 2)]
    other = prompt.ids[: min(80, len(prompt.ids))]
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    n, room = len(short), len(other) - len(short)
    device = device_of(model)
    cases = {
        "none": (short, other[:n], [1] * n, 0),
        "right": (short + [pad] * room, other, [1] * n + [0] * room, 0),
        "left": ([pad] * room + short, other, [0] * room + [1] * n, room),
        "left, no position ids": ([pad] * room + short, other, [0] * room + [1] * n, room),
    }
    made = {}
    with torch.inference_mode():
        alone = model(input_ids=torch.tensor([short], device=device), use_cache=False).logits[0].float()
        for name, (row, beside, mask, start) in cases.items():
            seen = torch.tensor([mask, [1] * len(beside)], device=device)
            given: dict[str, Any] = {"input_ids": torch.tensor([row, beside], device=device), "attention_mask": seen}
            if name == "left":
                given["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
            try:
                got = model(**given, use_cache=False).logits[0, start : start + n].float()
            except TypeError:  # a model without position ids
                continue
            made[name] = {
                "change": float((got - alone).abs().max() / alone.std()),
                "choices": float((got.argmax(-1) != alone.argmax(-1)).double().mean()),
            }
    return made


def _contexts(
    model: nn.Module, tokenizer: Any, read: Sequence[Text], seed: int, quick: bool
) -> tuple[tuple[list[int], Any], dict[str, str]]:
    """Loss of the same tokens after shorter and longer contexts, as long as model, text and machine allow."""
    device, most = device_of(model), max_context(model)
    room = _ROOM.get(device.type, 4096) // (4 if quick else 1)
    absolute = any(
        isinstance(m, nn.Embedding)
        and most <= m.num_embeddings <= most + 8
        and ("pos" in n.lower() or n.endswith("wpe"))
        for n, m in model.named_modules()
    )
    limit = min(room + _SCORED, most if absolute else 2 * most + _SCORED)
    held = max((len(text.content) for text in read), default=0)
    limit = min(limit, max(held, sum(len(text.content) for text in read) // 4))  # a token holds a character or more
    sizes = [size for size in (256, 512, 1024, 2048, 4096, 8192, 16384) if size <= room and size + _SCORED <= limit]
    prompts: list[Prompt] = []
    while sizes and not prompts:
        try:
            prompts = draw(read, tokenizer, sizes[-1] + _SCORED, 3, seed, max_context=2**40)
        except UserError:
            sizes.pop()  # the text is too short
    refused = {}
    if len(sizes) < 2:
        return ([], np.zeros((0, 0))), {"contexts": "the text is too short"}
    if absolute and 2 * most <= room:
        refused["beyond"] = f"its table of positions ends at {most}"
    rows = []
    for size in sizes:
        mine = []
        for prompt in prompts:
            ids = reading(model, Prompt(prompt.ids[-(size + _SCORED) :], prompt.name))
            with torch.inference_mode():
                mine.append(token_nll(model(input_ids=ids, use_cache=False).logits, ids)[-_SCORED:].mean())
        rows.append(mine)
    return (sizes, np.array(rows)), refused


def _alone(model: nn.Module, made: Measures, prompt: Prompt, quick: bool, say: Progress) -> HeadTable:
    """What the loss of one prompt gains without each head, or without each of the likeliest where they are many.

    Those are the ones that write least beside their layer, and the ones that rest most on the first token.
    """
    own = made.found["attention"].tables[FIRST]
    known = [(int(r), int(h)) for r, h in np.argwhere(np.isfinite(own.mean))]
    if len(known) > (16 if quick else _SINGLE):
        count = 8 if quick else 32
        written = made.found["body"].tables["written"]
        with np.errstate(divide="ignore", invalid="ignore"):  # layers write more the deeper they are
            beside = written.mean / np.nanmedian(written.mean, 1, keepdims=True)
        faint = HeadTable("of the layer's median", written.sites, beside, layers=written.layers)
        known = list(dict.fromkeys([*faint.top(count // 2, largest=False), *own.top(count)]))[:count]
    ids = reading(model, Prompt(prompt.ids[:512], prompt.name))
    values = np.full(own.mean.shape, np.nan)

    def loss(*strategies: str) -> float:
        with use(model, *strategies), torch.inference_mode():
            return mean_loss([token_nll(model(input_ids=ids, use_cache=False).logits, ids)])

    whole = loss()
    for i, head in enumerate(known):
        (name,) = own.names([head])
        say(len(known) + i, 2 * len(known), "heads ablated one by one")
        values[head] = loss(f"ablate:heads={name}") - whole
    about = {"tokens": ids.shape[1], "by": "zero"}
    return HeadTable("loss gained without the head, nats", own.sites, values, about, own.layers)
