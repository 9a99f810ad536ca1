# SPDX-License-Identifier: Apache-2.0
"""How much an answer's tokens attend to the source that has to support them: a check for made-up content.

"Theoretical Foundations and Mitigation of Hallucination in Large Language Models" (no arXiv id is known to us; its
abstract alone could be read). It defines hallucination as content that the source does not support, bounds its risk,
and names what a detector can go by: how sure the model is of its tokens, and whether it attends to the source.

The bounds are in :mod:`manyheads.experiment.risk_bounds` and the thresholds for not answering in
:mod:`manyheads.experiment.selective`, all in their standard forms, which are inferred; they are put together by
:func:`manyheads.inspect.risk.risk_report`. This lens is the check of attention. For the row t that predicts a token of
the answer, in a layer and head with weights ``A``,

    source mass  a_t = sum over s in source of A[t, s]
    lookback     l_t = c_t / (c_t + g_t),   c_t, g_t = means of A[t, s] over the context and over what was generated

The context is every token before the answer. ``l_t`` is 1 at the first generated token, where nothing was generated
yet; it is the ratio of Lookback Lens (arXiv 2407.07071), whose classifier over all layers and heads is one of the
detectors. The paper leaves open what the check averages: here all layers and heads for a token's series, and each by
itself in the tables.

    roles = TokenSpans({"source": [[(5, 80)]], "response": [[(95, 99)]]})
    with manyheads.watch(model, "hallucination_risk", roles=roles) as seen, torch.no_grad():
        model(prompt_and_answer)  # one forward over what was generated before, or generate() itself
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..call import Site
from ..calls.statistics import Statistic, WeightedSum
from ..errors import UserError
from ..heads import listed
from ..lens import AttentionView, Lens, LensResult, Memory, table

__all__ = ["HallucinationRisk"]

_NAMES = {"source mass": "attention on the source", "lookback": "attention on a token before the answer, of both"}


@dataclass(frozen=True, kw_only=True)
class HallucinationRisk(Lens):
    """Source mass and lookback ratio of the tokens of an answer, for each head and answer."""

    asks: ClassVar[bool] = True

    span: str = field(default="source", metadata={"help": "role of the tokens that have to support the answer"})
    rows: str = field(default="response", metadata={"help": "role of the tokens of the answer"})

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.kind != "cross" and (site.causal or not site.peers)

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        for role in (self.span, self.rows):
            if role not in (*view.roles.spans, "bos", "response"):
                raise UserError(
                    f"hallucination_risk looks for tokens of the role {role!r}, and none are given: watch with "
                    f"roles=TokenSpans({{{role!r}: [[(first, last + 1)]]}}), or set its field span or rows"
                )
        answer = view.columns(self.rows)
        parts = (view.columns(self.span) & ~answer, view.keys & ~answer, answer)
        return {"mass": WeightedSum(torch.stack(parts, -1).float())}

    def update(self, view: AttentionView, found: dict[str, Any]) -> None:
        mass: Tensor = found["mass"].float()
        # A row predicts the next token, so those that look stand one before the answer's tokens.
        rows = view.roles.mask(self.rows, view.query_positions + 1, view.valid.shape[0]) & view.valid
        answer = view.columns(self.rows)
        before = (view.key_positions <= view.query_positions[:, None])[None]  # [1, T, S]
        generated = (answer[:, None] & before).sum(-1)[:, None]  # [B, 1, T]
        context = (view.keys & ~answer).sum(-1)[:, None, None]
        c, g = mass[..., 1] / context.clamp(min=1), mass[..., 2] / generated.clamp(min=1)
        values = {"source mass": mass[..., 0], "lookback": c / (c + g).clamp(min=torch.finfo(c.dtype).tiny)}
        for name, value in values.items():
            view.add_mean(name, value, rows[:, None])
            view.add_tokens(f"{name} of tokens", value.mean(1), rows)

    def compute(self, sites: Sequence[tuple[Site, Memory]]) -> LensResult:
        tables = {key: table(name, sites, key, span=self.span, rows=self.rows) for key, name in _NAMES.items()}
        series = {}
        for key in _NAMES:
            rows = [memory[f"{key} of tokens"].rows() for _, memory in sites]
            series[key] = [np.mean([site[n] for site in rows], 0) for n in range(len(rows[0]))]
        known = tables["source mass"].values[np.isfinite(tables["source mass"].values)]
        if not known.size:
            return LensResult(tables, series, notes=[f"No token of {self.rows} was predicted here."])
        top = tables["source mass"].top(3)
        notes = [
            f"A token of {self.rows} is predicted with {known.mean():.1%} of the attention on {self.span}; most by the "
            f"heads {listed(tables['source mass'], top, '.2f')}."
        ]
        return LensResult(tables, series, notes=notes)
