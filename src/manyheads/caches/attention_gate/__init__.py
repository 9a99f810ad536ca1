# SPDX-License-Identifier: Apache-2.0
"""A trained gate in front of each layer says of every token and head whether its key and value are remembered.

Zeng et al., "In-context KV-Cache Eviction for LLMs via Attention-Gate", arXiv 2410.12876. The gate of a layer is a
small causal attention MHA' over the layer's inputs x (after their norm), and a linear layer to one logit for each
key/value head; with the threshold tau

    p = sigmoid(W (MHA'(x) + V x) + b)        flag = [p > tau]
    query i sees key j  iff  j <= i  and  (flag_j or j = i)

and keys and values without a flag are not cached. As MHA' is causal, the flag of a token depends on nothing after it: a
prompt read in chunks is gated as one read at once, and what is dropped is freed after every forward. Heads keep unequal
numbers, which lie in ragged storage; decoding runs over what is there. The model stays as it is and only gates are
trained (:mod:`manyheads.caches.attention_gate.soft`), in minutes:

    python -m manyheads.recipes.attention_gate --model MODEL --out gates --target 0.3
    with manyheads.use(model, "attention_gate:gates=gates"): ...

As in the paper the gates act on the prompt, and tokens made after it are all kept (``schedule=prefill``); ``chunk``
gates whatever later comes many at a time, ``step`` every token. Both have to keep the gate's own keys and values of all
tokens, 2 H' d' numbers each, beside what is left of the cache.

We had abstracts and reviews of the paper, no text and no code. Inferred: H' = 2 heads of d' = 16 channels, tau = .5
(the training recipe sets another, at which the target is met), gates by key/value head where heads are grouped, that a
token always sees itself, no positions in the gate, and biases that start at 2. Ours: V x, the value of the token
itself; and the recipe keeps the first four tokens whatever the gates say, without which a short training falls apart,
and lowers the target from 1. Reading a prompt at once masks T x T for each key/value head; read a long one in chunks.
Caches of latents (MLA) are refused.
"""

import functools
from dataclasses import dataclass, field
from typing import ClassVar

from ...attention.budget import Budget
from ...call import Site
from ...errors import UserError
from .._strategy import EvictionStrategy
from .gates import HOW, Gate, Gates
from .store import GateStore

__all__ = ["AttentionGate", "Gate", "Gates"]


@dataclass(frozen=True, kw_only=True)
class AttentionGate(EvictionStrategy):
    """Remember what trained gates keep.

    Attributes:
        gates: folder of the gates, as :meth:`Gates.save` wrote it.
        threshold: probability above which a token is kept, below 1; that of the gates themselves where it is negative.
        schedule: ``prefill`` gates the first prompt, ``chunk`` all that comes many at a time, ``step`` every token.
        sinks: first tokens that are never dropped, if that is more than the gates were trained with.
        budget, recent: always 1.0 and 0: the gates say how many stay.
    """

    has_budget: ClassVar[bool] = False
    dense_prefill: ClassVar[bool] = False
    exact_chunks: ClassVar[bool] = True

    gates: str = field(default="", metadata={"help": f"folder of trained gates; {HOW} makes one"})
    threshold: float = field(default=-1.0, metadata={"help": "keep above this probability; the gates' own if negative"})
    budget: Budget = field(default=1.0, metadata={"help": "always 1.0: the gates say how many stay"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gates:
            raise UserError(f"attention_gate needs gates=FOLDER, trained on the model: {HOW}")
        if self.budget != 1.0 or isinstance(self.budget, int) or self.recent:
            raise UserError("attention_gate keeps what its gates keep: train them for another target, or set threshold")
        if self.threshold >= 1:
            raise UserError("attention_gate: a threshold of 1 keeps nothing; give one below")
        if self.schedule not in ("prefill", "chunk", "step"):
            raise UserError(f"attention_gate: schedule is prefill, chunk or step, not {self.schedule}")

    @functools.cached_property
    def trained(self) -> Gates:
        """The gates."""
        return Gates.load(self.gates)

    @property
    def limit(self) -> float:
        """The threshold that is used."""
        return self.trained.threshold if self.threshold < 0 else self.threshold

    @property
    def protected(self) -> int:
        return max(self.sinks, self.trained.sinks)

    @property
    def lossless(self) -> bool:
        return False

    def store(self, site: Site) -> GateStore:
        self.trained.check(site, self.gates)
        return GateStore(self, site)
