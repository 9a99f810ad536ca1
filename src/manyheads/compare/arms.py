# SPDX-License-Identifier: Apache-2.0
"""Arms of a comparison: a strategy at a budget, and how its cache comes to be and is fed."""

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.budget import as_budget, keep_limit
from ..errors import UserError
from ..integrations import use
from ..integrations.transformers import new_cache
from ..lens import Lens
from ..spec import parse, read
from ..strategy import Attention, Cache, Denoiser, Mixer, Strategy

__all__ = ["BASELINE", "Arm", "Prefix", "forward_chunked", "make_arms"]

BASELINE = "full"
_LEAST_RECORD = 64  # queries that a dense prefill keeps for the strategies forked from it
_SLACK = 50  # a query of a chunk sees at most one slot in this many beyond the budget


@dataclass(frozen=True)
class Arm:
    """A strategy with its budget. ``key`` names it in rows and is unique in a run.

    Attributes:
        strategy: what is compared.
        label: the spec without its budget, common to all budgets of one strategy.
    """

    strategy: Strategy
    label: str

    @property
    def key(self) -> str:
        if not (isinstance(self.strategy, Cache) and self.strategy.has_budget):
            return self.label
        return f"{self.label}{',' if ':' in self.label else ':'}budget={self.budget}"

    @property
    def slug(self) -> str:
        return self.strategy.slug

    @property
    def budget(self) -> int | float:
        """Slots, or the fraction of the tokens, that the arm keeps; 1.0 where the strategy has no budget."""
        return self.strategy.budget if isinstance(self.strategy, Cache) else 1.0

    @property
    def forks(self) -> bool:
        """Whether a dense prefill that others share serves this arm too."""
        return isinstance(self.strategy, Cache) and self.strategy.dense_prefill

    @property
    def stores(self) -> bool:
        return isinstance(self.strategy, Cache)

    @property
    def record(self) -> int:
        """Last queries of the prefill that the strategy needs."""
        return self.strategy.record if isinstance(self.strategy, Cache) else 0

    @property
    def needs_queries(self) -> bool:
        """Whether the strategy has to see all queries of a context in one forward."""
        return isinstance(self.strategy, Cache) and self.strategy.needs_queries

    def chunk_size(self, slots: int) -> int | None:
        """Most tokens to feed at once so that each is seen as in decoding, None for any number.

        Exact for strategies that evict at the prefill only, that say so (``exact_chunks``), or that evict every m
        tokens (m at once). Those that evict at every step get chunks so short that no query sees more than one slot
        in fifty beyond the budget.
        """
        if not isinstance(self.strategy, Cache):
            return None
        schedule = self.strategy.schedule
        if isinstance(schedule, int):
            return schedule
        if schedule != "step" or self.strategy.exact_chunks or self.budget == 1.0:
            return None
        return 1 + slots // _SLACK


def make_arms(specs: Iterable[str | Strategy], budgets: Sequence[int | float | str], shortest: int) -> list[Arm]:
    """Arms of every spec at every budget, ``full`` first, each once; a spec that names its budget is one arm.

    Args:
        specs: strategies or their specs.
        budgets: fractions in (0, 1] or whole numbers of slots.
        shortest: tokens of the shortest context, which every budget has to fit.

    Raises:
        UserError: unknown strategy or field, a budget that is none or cannot hold the protected tokens.
    """
    values = [as_budget(budget) for budget in budgets]
    arms = [Arm(parse(BASELINE), BASELINE)]
    for given in specs:
        strategy = parse(given)
        if isinstance(strategy, Lens) and not strategy.edits_model:
            raise UserError(f"{strategy.slug} only looks: manyheads inspect --lens {strategy.slug}")
        if isinstance(strategy, Denoiser):
            raise UserError(
                f"{strategy.slug} acts on denoisers: open a pipeline of diffusers with it (docs/diffusion.md)"
            )
        if isinstance(strategy, Mixer) and not isinstance(strategy, Attention | Cache):
            raise UserError(f"{strategy.slug} is a token mixer, trained from scratch: compare it with --train")
        fields = {f.name: f for f in dataclasses.fields(strategy)}
        own = isinstance(given, Strategy) or "budget" in read(given).fields
        if strategy.slug == BASELINE:
            continue
        if not isinstance(strategy, Cache) or "budget" not in fields:
            arms.append(Arm(strategy, strategy.spec))
            continue
        label = _label(given, strategy)
        if own or not strategy.has_budget:
            arms.append(Arm(strategy, label))
            continue
        if not values:
            raise UserError("no budget is given; write for instance --budgets 0.5,0.25")
        arms += [Arm(_with_budget(strategy, value), label) for value in values]
    unique = list({arm.key: arm for arm in arms}.values())
    for arm in unique:
        if isinstance(arm.strategy, Cache) and (isinstance(arm.budget, int) or arm.budget < 1):
            arm.strategy.check(keep_limit(arm.budget, shortest))
    return unique


def _with_budget(strategy: Any, budget: int | float) -> Strategy:
    changed: Strategy = dataclasses.replace(strategy, budget=budget)
    return changed


def _label(given: str | Strategy, strategy: Strategy) -> str:
    """The fields that were set, without the budget, in the order of the class."""
    if isinstance(given, str):
        named = set(read(given).fields)
    else:
        plain = type(strategy)()
        named = {f.name for f in dataclasses.fields(strategy) if getattr(strategy, f.name) != getattr(plain, f.name)}
    items = [
        f"{f.name}={getattr(strategy, f.name)}" for f in dataclasses.fields(strategy) if f.name in named - {"budget"}
    ]
    return strategy.slug + (":" + ",".join(items) if items else "")


class Prefix:
    """Tokens ``[B, L]`` that a model has read, and the caches that the arms have of them.

    One dense prefill serves every arm that compresses after it; the others read the tokens by themselves. The port of
    the model must be open.
    """

    def __init__(self, model: nn.Module, ids: Tensor, arms: Iterable[Arm]) -> None:
        self.model = model
        self.ids = ids
        forked = [arm for arm in arms if arm.forks]
        self._record = max([_LEAST_RECORD, *(arm.record for arm in forked)])
        self._whole = any(arm.needs_queries for arm in forked)  # see a prompt in one forward
        self._read(ids, anew=True)

    def _read(self, ids: Tensor, anew: bool) -> None:
        if anew:
            self._dense = new_cache(self.model, parse(BASELINE), record=self._record)
        _forward(self.model, ids, self._dense, 1)

    def extend(self, ids: Tensor) -> None:
        """Read on: ``ids [B, T]``, after what was read or, where a strategy has to see all queries, with it anew."""
        self.ids = torch.cat([self.ids, ids], 1)
        self._read(self.ids if self._whole else ids, anew=self._whole)

    @contextmanager
    def open(self, arm: Arm) -> Iterator[Any]:
        """The cache of ``arm`` after these tokens, to be fed while the block lasts."""
        if arm.forks:
            yield self._dense.fork(arm.strategy)
        elif arm.stores:
            cache = new_cache(self.model, arm.strategy)
            _forward(self.model, self.ids, cache, 1)
            yield cache
        else:
            with use(self.model, arm.strategy):
                cache = new_cache(self.model, parse(BASELINE))
                _forward(self.model, self.ids, cache, 1)
                yield cache


def forward_chunked(model: nn.Module, cache: Any, ids: Tensor, keep: int, chunk_size: int | None = None) -> Tensor:
    """Continue ``cache`` with ``ids [B, T]``, ``chunk_size`` at a time: float32 logits ``[B, keep, V]`` of the last."""
    size = chunk_size or ids.shape[1]
    outputs = []
    for start in range(0, ids.shape[1], size):
        piece = ids[:, start : start + size]
        wanted = min(piece.shape[1], start + piece.shape[1] - (ids.shape[1] - keep))
        logits = _forward(model, piece, cache, max(1, wanted))
        if wanted > 0:
            outputs.append(logits[:, -wanted:].float())
    return torch.cat(outputs, 1)


def _forward(model: nn.Module, ids: Tensor, cache: Any, keep: int) -> Tensor:
    more = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, **more).logits
    return logits[:, -keep:]
