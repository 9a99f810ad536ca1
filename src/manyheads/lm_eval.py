# SPDX-License-Identifier: Apache-2.0
"""The model ``manyheads`` of lm-eval: its own Hugging Face model, with strategies acting.

    manyheads lm-eval --model manyheads --model_args pretrained=MODEL,strategy=hedge:budget=0.25 --tasks arc_easy

lm-eval's command line loads no plugins, so ``manyheads lm-eval`` registers the model and hands on all that follows. In
Python importing this module is enough for ``lm_eval.simple_evaluate(model="manyheads", ...)``.

What a strategy of the cache means where lm-eval scores a continuation in one forward, in which no cache would act: all
tokens of the context but the last are read, the cache is compressed, and the last token and the continuation go through
what is left of it. So every figure comes after compression, that of a continuation of one token too. Continuations of
one context share its reading. Text is generated as under :func:`manyheads.use`: the whole context is read, the
first token is predicted by that forward, and all others from the compressed cache. A rolling likelihood has no
context: strategies that evict while they decode act on it, all other caches refuse; ``manyheads compare --tasks
perplexity`` measures a loss after compression. ``batch_size=auto`` counts as 1 for continuations under a cache.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, cast

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from .catalog import load
from .errors import UserError
from .experiment.arms import Arm
from .integrations import use
from .integrations.cache import cache_arguments
from .integrations.transformers import new_cache
from .models import source
from .questions import split
from .spec import parse, read, split_together
from .tasks.text._prefill import chunk_size

__all__ = ["ManyHeadsLM"]

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, tokens of the context and of the continuation
_log = logging.getLogger(__name__)
_OWN = frozenset(inspect.signature(HFLM.__init__).parameters)


@dataclass(frozen=True)
class _Row:
    """One continuation: where its answer goes, what is read and compressed before, what is fed then, and targets."""

    place: int
    read: tuple[int, ...]
    fed: list[int]
    wanted: list[int]


def strategies_of(text: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A spec with the pieces that lm-eval cut off at its commas, and the arguments that are not such pieces.

        strategies_of("snapkv:budget=0.5", {"window_size": 8, "revision": "main"})
        ("snapkv:budget=0.5,window_size=8", {"revision": "main"})

    Args:
        text: what lm-eval made of ``strategy=``.
        arguments: those beside it, in their order.
    """
    others = {}
    for name, value in arguments.items():
        opened = text.count("(") > text.count(")")
        slug = read(split_together(text)[-1]).name if not opened else ""
        known = {f.name for f in fields(type(parse(slug)) if slug == "auto" else load(slug))} if slug else set()
        if name not in _OWN and (opened or name in known):
            text += ("," if ":" in text.rpartition(" + ")[2] else ":") + f"{name}={value}"
        else:
            others[name] = value
    return text, others


@register_model("manyheads")
class ManyHeadsLM(HFLM):  # type: ignore[misc]
    """A decoder-only model of transformers under strategies of manyheads; without one exactly lm-eval's ``hf``.

    Args:
        pretrained: folder, hub name, a name of ``manyheads.models.published``, or a loaded model.
        strategy: as in :func:`manyheads.use`: ``auto``, ``snapkv:budget=0.5``, several joined by `` + ``.
        arguments: all others of lm-eval's ``hf``.

    Raises:
        UserError: the model or its cache does not take the strategy.
    """

    def __init__(self, pretrained: Any, strategy: str = "", **arguments: Any) -> None:
        text = str(strategy or "")
        if text:
            text, arguments = strategies_of(text, arguments)
        self.strategies = tuple(parse(spec) for spec in split_together(text)) if text else ()
        self.acting, self.keeping = split(self.strategies)
        self.caches = len(self.acting) < len(self.strategies)
        super().__init__(source(pretrained) if isinstance(pretrained, str) else pretrained, **arguments)
        if self.strategies and self.backend != "causal":
            raise UserError(f"{type(self.model).__name__} reads with an encoder; give a decoder-only language model")
        if self.caches:
            new_cache(self.model, self.keeping)  # refused now and not after an hour
        self._arm = Arm(self.keeping.spec, self.keeping.spec)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        evicts_at_prompts = self.keeping.schedule in ("prefill", "turn", "chunk")
        if self.caches and evicts_at_prompts and self.keeping.spec != "full":
            tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
            raise UserError(
                f"a rolling likelihood has no context that {self.keeping.spec} could compress: leave out {tasks}, or "
                "run `manyheads compare --tasks perplexity`"
            )
        found: list[float] = super().loglikelihood_rolling(requests, disable_tqdm)
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        if not self.strategies or not requests:
            plain: list[str] = super().generate_until(requests, disable_tqdm)
            return plain
        with use(self.model, *self.strategies):
            made: list[str] = super().generate_until(requests, disable_tqdm)
        return made

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if not requests or not self.strategies:
            return self._plain(requests, disable_tqdm, override_bs)
        if not self.caches:
            with use(self.model, *self.strategies):
                return self._plain(requests, disable_tqdm, override_bs)
        size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 1)
        answers: dict[int, tuple[float, bool]] = {}
        with (
            torch.inference_mode(), use(self.model, *self.acting),
            tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Continuations") as bar,
        ):  # fmt: skip
            for rows in self._batches(requests, size):
                answers |= self._scored(rows)
                bar.update(len(rows))
        if bare := sum(len(context) == 1 for _, context, _ in requests):
            _log.warning(
                "%d of %d continuations follow a single token, of which nothing can be dropped", bare, len(requests)
            )
        for place, (texts, _, _) in enumerate(requests):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answers[place])
        return [answers[place] for place in range(len(requests))]

    def _plain(self, requests: Any, disable_tqdm: bool, override_bs: int | None) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        return found

    def _batches(self, requests: Sequence[Request], size: int) -> Iterator[list[_Row]]:
        """Rows by falling length, those of one context together; contexts of one token, read by nobody, apart."""
        rows = []
        for place, (_, context, wanted) in enumerate(requests):
            whole = (context + wanted)[-(self.max_length + 1) :]  # cut on the left, as lm-eval does
            start = len(whole) - len(wanted)
            rows.append(_Row(place, tuple(whole[: start - 1]), whole[start - 1 : -1], wanted))
        rows.sort(key=lambda row: (-len(row.read), row.read, -len(row.fed)))
        for _, group in groupby(rows, lambda row: not row.read):
            some = list(group)
            yield from (some[i : i + size] for i in range(0, len(some), size))

    def _scored(self, rows: Sequence[_Row]) -> dict[int, tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the greedy one, by place; the port is open."""
        unique = {read: i for i, read in enumerate(dict.fromkeys(row.read for row in rows))}
        cache = new_cache(self.model, self.keeping)
        reads, seen = self._padded(list(unique), left=True)
        if reads.shape[1]:
            self._forward(reads, seen, cache)
            which = torch.tensor([unique[row.read] for row in rows])
            if which.tolist() != list(range(len(unique))):
                cache.reorder_cache(cast("Any", which))
            seen = seen[which.to(seen.device)]
        else:
            seen = seen.expand(len(rows), 0)
        fed, new = self._padded([row.fed for row in rows], left=False)
        step, logits = chunk_size(self._arm, reads.shape[1]) or fed.shape[1], []
        for at in range(0, fed.shape[1], step):
            seen = torch.cat([seen, new[:, at : at + step]], 1)
            logits.append(self._forward(fed[:, at : at + step], seen, cache))
        scores = log_softmax(torch.cat(logits, 1), -1, dtype=self.softmax_dtype)
        found = {}
        for row, mine in zip(rows, scores, strict=True):
            mine, wanted = mine[: len(row.wanted)], torch.tensor(row.wanted, device=scores.device)
            total = float(mine.gather(1, wanted[:, None]).sum())
            found[row.place] = total, bool((mine.argmax(-1) == wanted).all())
        return found

    def _forward(self, ids: Tensor, seen: Tensor, cache: Any) -> Tensor:
        """Logits ``[B, T, V]`` of ``ids [B, T]``, the last columns of the mask ``seen``; padding gets no position."""
        more: dict[str, Any] = {}
        if not bool(seen.all()):
            more["attention_mask"] = seen
            if "position_ids" in inspect.signature(self.model.forward).parameters:
                more["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits: Tensor = self.model(input_ids=ids, **cache_arguments(self.model, cache), **more).logits
        return logits

    def _padded(self, rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, T]`` of rows and their mask, padded on one side."""
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = torch.tensor(row, dtype=torch.long, device=self.device), 1
        return ids, mask
