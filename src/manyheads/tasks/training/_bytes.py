# SPDX-License-Identifier: Apache-2.0
"""Text as bytes, parted by file.

Bytes rather than a learned vocabulary: a loss per byte can be compared between any two texts and runs, no tokenizer has
to be trained out of the budget, and a small model spends its parameters on the mixer instead of on embeddings.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...data.texts import Text
from ...errors import UserError

__all__ = ["VOCAB", "Bytes", "flat", "split"]

VOCAB = 256
_PARTS = {"test": 0.1, "validation": 0.05}


class Bytes:
    """What contexts and planted constants need of a tokenizer: a token is a byte of UTF-8."""

    bos_token_id = None

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return bytes(ids).decode(errors="replace")


def split(texts: Sequence[Text]) -> dict[str, list[Text]]:
    """Part ``texts`` into ``train``, ``validation`` and ``test``; whole files as long as there are ten or more.

    Files are taken in the order of their sha256, so that a file stays in its part whatever others are added; fewer
    files are each cut in three.
    """
    parts: dict[str, list[Text]] = {"test": [], "validation": [], "train": []}
    if len(texts) < 10:
        for text in texts:
            first = 0
            for part, share in (*_PARTS.items(), ("train", 1.0)):
                last = len(text.content) if part == "train" else first + int(share * len(text.content))
                parts[part].append(Text(f"{text.name} ({part})", text.content[first:last]))
                first = last
        return parts
    whole = sum(len(text.content) for text in texts)
    waiting = sorted(texts, key=lambda text: (text.sha256, text.name))
    for part, share in _PARTS.items():
        while waiting and sum(len(text.content) for text in parts[part]) < share * whole:
            parts[part].append(waiting.pop())
    parts["train"] = waiting
    return parts


def flat(texts: Sequence[Text], least: int, part: str) -> Tensor:
    """All ``texts`` as one row of bytes, uint8; UserError if there are fewer than ``least``."""
    data = "\n".join(text.content for text in texts).encode()
    if len(data) < least:
        raise UserError(
            f"the text is too short: its {part} part has {len(data)} bytes and needs {least}; "
            "give more text or a shorter --lengths"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
