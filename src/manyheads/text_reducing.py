# SPDX-License-Identifier: Apache-2.0
"""The kind of strategies that shorten a text before a model reads it; what they leave out is gone."""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from .errors import UserError
from .files import write_atomically
from .strategy import Strategy

__all__ = ["Shortened", "TextReducer", "TextWeights"]


@dataclass(frozen=True, slots=True)
class Shortened:
    """A text in pieces, and which of them are kept.

    Attributes:
        pieces: all of them joined are the text as it was read.
        kept: one for each.
        weights: what each is worth; None where they are not known.
    """

    pieces: tuple[str, ...]
    kept: tuple[bool, ...]
    weights: tuple[float, ...] | None = None

    @property
    def text(self) -> str:
        """What is left, with a space between words that have come together."""
        made, gap = "", False
        for piece, kept in zip(self.pieces, self.kept, strict=True):
            if kept:
                made += " " * (gap and made[-1:].isalnum() and piece[:1].isalnum()) + piece
            gap = not kept
        return made.strip()


@dataclass(frozen=True, slots=True)
class TextWeights:
    """Attention that tokens receive, in means of their text.

    Attributes:
        statements: by category of the statement, or whatever else a text has parts of.
        words: by word.
    """

    statements: Mapping[str, float]
    words: Mapping[str, float]

    def save(self, path: str | Path) -> None:
        """Write them as JSON."""
        write_atomically(Path(path), json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "TextWeights":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the file cannot be read, or is something else.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(*({str(k): float(v) for k, v in data[name].items()} for name in ("statements", "words")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} has no weights of words ({error}); write them with learn(...).save") from error


class TextReducer(Strategy):
    """Shortens texts before a model reads them.

    Attributes:
        learns: needs weights of :meth:`learn`.
    """

    learns: ClassVar[bool] = False

    @abstractmethod
    def read(self, text: str, tokenizer: Any) -> Any:
        """The text in pieces; its ``text`` is what a model is to read where attention is measured."""

    def learn(self, read: Sequence[Any], received: Sequence[Sequence[float]]) -> TextWeights:
        """Weights from texts as :meth:`read` gave them, and the attention that each token of each received."""
        raise UserError(f"{self.slug} follows rules and learns nothing: give no model and no weights")

    @abstractmethod
    def shorten(self, text: str, tokenizer: Any, weights: TextWeights | None = None) -> Shortened:
        """The text in no more tokens of a fast ``tokenizer`` than the budget has."""
