# SPDX-License-Identifier: Apache-2.0
"""What attention costs, by family: FLOPs, bytes, state and time, on a named card or on this machine.

:mod:`.sparse`, :mod:`.linear` and :mod:`.stored` have a frozen dataclass for each kind of computation;
``families.toml`` says which families there are, what they cite and which strategies belong to them; :mod:`.cards` knows
hardware, and :mod:`.advice` ranks.
"""

from .advice import Advice, Setting, crossover, ranked
from .base import Family, Layer, total
from .cards import Card, calibrate, card, cards
from .taxonomy import Entry, families, family, family_of

__all__ = [
    "Advice", "Card", "Entry", "Family", "Layer", "Setting", "calibrate", "card", "cards", "crossover",
    "families", "family", "family_of", "ranked", "total",
]  # fmt: skip
