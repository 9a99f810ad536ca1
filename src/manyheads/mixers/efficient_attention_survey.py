# SPDX-License-Identifier: Apache-2.0
"""The mixer whose family costs least: a taxonomy of efficient attention, put to use.

Sun et al., "Efficient Attention Mechanisms for Large Language Models: A Survey", arXiv 2507.19595, sorts methods into
linear (kernelised, with decay, in-context), sparse (fixed, by blocks, by clusters) and hybrid ones. Here the taxonomy
is data (``costs/families.toml``) with formulas of what each family costs (:mod:`manyheads.costs`); ``manyheads
recommend`` ranks all of them at a length, on a card. As a mixer it is the family that is predicted to be the fastest at
the trained length, so that what the model says can be trained and compared:

    manyheads compare --train --strategies softmax,efficient_attention_survey:card=h100,tokens=65536

Cost is all that it knows: which family learns a text best is what the comparison is for. The survey measures nothing;
formulas, cards and the choice are ours. Its Mamba, delta rules, retrieval and mixture-of-experts rows have no strategy
in the library and so no family.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from ..call import MixerConfig
from ..catalog import load
from ..costs import Entry, Layer, Setting, card, ranked
from ..errors import UserError
from ..spec import parse
from ..strategy import Mixer

__all__ = ["EfficientAttentionSurvey"]


@dataclass(frozen=True, kw_only=True)
class EfficientAttentionSurvey(Mixer):
    """The mixer of the family that costs least.

    Attributes:
        card: to run on, as ``manyheads recommend`` takes it; ``this`` is measured.
        what: what is to be fast: ``train``, ``prefill`` or ``decode``.
        tokens: length that counts; 0 for the trained one.
    """

    directions = ("causal", "bidirectional")

    card: str = field(default="cpu", metadata={"help": "card to run on, as h100; this: measured here"})
    what: Literal["train", "prefill", "decode"] = field(
        default="train", metadata={"help": "what is to be fast: train, prefill or decode"}
    )
    tokens: int = field(default=0, metadata={"help": "length that counts; 0: the trained one"})

    def __post_init__(self) -> None:
        if self.what not in ("train", "prefill", "decode"):
            raise UserError(f"{self.slug}: what is train, prefill or decode, not {self.what!r}")
        if self.tokens < 0:
            raise UserError(f"{self.slug}: tokens is a length, or 0 for the trained one, not {self.tokens}")

    def chosen(self, config: MixerConfig) -> Entry:
        """The family that is predicted to be the fastest of those that have a mixer for the model.

        Raises:
            UserError: the card is not known.
        """
        on = card(self.card, 4 if self.card == "cpu" else 2)
        layer = Layer(
            length=self.tokens or config.length, heads=config.num_heads, kv_heads=config.num_kv_heads,
            head_dim=config.head_dim, itemsize=2 if on.fused else 4, causal=config.causal,
        )  # fmt: skip
        direction = "causal" if config.causal else "bidirectional"
        for one in ranked(Setting(layer=layer, card=on, what=self.what)):
            kind = load(one.entry.members[0]) if one.entry.category == "mixers" else None
            if kind is not None and issubclass(kind, Mixer) and direction in kind.directions:
                return one.entry
        raise UserError(f"{self.slug}: no family has a {direction} mixer")

    def build(self, config: MixerConfig) -> nn.Module:
        strategy = parse(self.chosen(config).spec)
        assert isinstance(strategy, Mixer)
        return strategy.build(config)
