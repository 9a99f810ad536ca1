# SPDX-License-Identifier: Apache-2.0
"""What a forward over tokens that processes share has to know; it travels with the mask that layers are given."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..attention.causal import causal_tail
from ..call import AttentionCall
from ..errors import UserError
from ..parallel._runs import causal_runs
from ..parallelism import FrontedAttention, SharedAttention
from .shared_decoding import Decoded

if TYPE_CHECKING:
    from .shared_tokens import SharedTokens

__all__ = ["Front", "Plan", "last_logits", "marked", "plan_of", "real_runs", "texts"]

_PLAN = "_manyheads_plan"


@dataclass(eq=False)
class Plan:
    """One forward of a model over tokens that are shared.

    Attributes:
        strategy: that shares them.
        size: tokens of the whole.
        runs: of each row of the batch, or one for all: tokens that are seen.
        apart: whether runs are texts in a row.
        main: attention of the mask that most layers have.
        kept: how many of the last tokens have logits; 0 for those of this process.
        labelled: whether there is a loss.
        front: keys and values by site of what this process has read first.
    """

    strategy: "SharedTokens"
    size: int
    runs: list[tuple[tuple[int, int], ...]]
    apart: bool
    before: int | None
    kept: int = 0
    labelled: bool = False
    front: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    main: SharedAttention | FrontedAttention = field(init=False)

    def __post_init__(self) -> None:
        runs, apart = (self.runs[0], self.apart) if len(set(self.runs)) == 1 else (((0, self.size),), True)
        self.main = self.strategy.share(causal_runs(self.size, runs, self.before, apart))
        if isinstance(self.main, FrontedAttention) and set(self.runs) != {((0, self.size),)}:
            raise UserError(f"{self.strategy.spec} shares whole prompts: leave padding away, or run rows one by one")

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Output ``[B, H, T, dv]`` and log-sum-exp ``[B, H, T]``."""
        before = None if call.site.window is None else call.site.window - 1
        if len(set(self.runs)) == 1:
            return self._shared(self.runs[0], before).attend(call.q, call.k, call.v, call.scale)
        found = []
        for i, runs in enumerate(self.runs):
            q, k, v = (x[i : i + 1] for x in (call.q, call.k, call.v))
            found.append(self._shared(runs, before).attend(q, k, v, call.scale))
        outs, lses = zip(*found, strict=True)
        return torch.cat(outs), torch.cat(lses)

    def real(self, like: Tensor) -> Tensor | None:
        """Which tokens of this process are no padding, bool ``[B, t]``; None for all."""
        whole = (((0, self.size),),)
        if self.apart or set(self.runs) == set(whole):
            return None
        rows = self.main.rows.to(like.device)
        found = [torch.stack([(rows >= a) & (rows < b) for a, b in runs]).any(0) for runs in self.runs]
        return torch.stack(found)

    def _shared(self, runs: tuple[tuple[int, int], ...], before: int | None) -> SharedAttention:
        found = self.strategy.share(causal_runs(self.size, runs, before, self.apart), self.main.layout)
        assert not isinstance(found, FrontedAttention)
        return found


@dataclass(eq=False)
class Front:
    """One forward of tokens that a process reads for itself, before those that are shared.

    Attributes:
        kept: their keys and values, by site.
    """

    kept: dict[str, tuple[Tensor, Tensor]]

    def attend(self, call: AttentionCall) -> Tensor:
        """Causal attention ``[B, T, H, dv]``, whose keys and values are noted."""
        self.kept[call.site.name] = call.k, call.v
        return causal_tail(call.q, call.k, call.v, call.scale)


def marked(plan: "Plan | Decoded | Front", tokens: Tensor, model: PreTrainedModel) -> Any:
    """A mask that models hand on as it is, of four dimensions, and that hides nothing; where layers differ one by type.

    The mask of layers that pass on a state would be made from it anew.
    """
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    setattr(mask, _PLAN, plan)
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    return dict.fromkeys({"full_attention", *types}, mask) if "linear_attention" in types else mask


def plan_of(mask: Any) -> "Plan | Decoded | Front | None":
    """What travels with a mask, or with those of several types of layers."""
    return getattr(mask["full_attention"] if isinstance(mask, dict) else mask, _PLAN, None)


def texts(places: Tensor) -> list[tuple[tuple[int, int], ...]]:
    """Texts of each row: one begins where a position does not follow the one before."""
    starts = torch.nn.functional.pad(places.diff(dim=1) != 1, (1, 0), value=True)
    return [_between(row.nonzero()[:, 0].tolist(), places.shape[1]) for row in starts]


def _between(starts: list[int], size: int) -> tuple[tuple[int, int], ...]:
    return tuple(zip(starts, [*starts[1:], size], strict=True))


def real_runs(told: Tensor | None, batch: int, size: int) -> list[tuple[tuple[int, int], ...]]:
    """Runs of tokens of each row that are no padding."""
    if told is None or bool(told.bool().all()):
        return [((0, size),)] * batch
    edges = torch.nn.functional.pad(told.bool().to(torch.int8), (1, 1)).diff(dim=1)
    firsts, lasts = ([(row == sign).nonzero()[:, 0].tolist() for row in edges] for sign in (1, -1))
    return [tuple(zip(a, b, strict=True)) for a, b in zip(firsts, lasts, strict=True)]


def last_logits(plan: Plan, logits: Tensor) -> Tensor:
    """Logits ``[B, n, V]`` of the last tokens, of those ``[B, t, V]`` that this process has of them; no gradients."""
    rows = [rows[rows >= plan.size - plan.kept] for rows in plan.main.layout.rows]
    every = plan.strategy.world.peers().all_gather(logits.detach().transpose(0, 1), list(map(len, rows)), "logits")
    return every[torch.cat(rows).argsort().to(every.device)].transpose(0, 1)
