# SPDX-License-Identifier: Apache-2.0
"""How far a model gets with a string of random digits that stands in its context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
from torch import Tensor

from ...experiment import Metric, RunContext
from ._corpus import encode
from ._fed import FedTask, Judged
from ._prefill import token_nll

__all__ = ["ExactString"]

_DIGITS = "0123456789abcdef"
_LENGTHS = (8, 16, 32)
_SAID, _ASKED = "\n\nThe code of this document is: ", "\n\nThe code of this document is: "


@dataclass(frozen=True, kw_only=True)
class ExactString(FedTask):
    """1 if all of the first ``digits`` of an identifier, 8, 16 or 32, are the likeliest, 0 else; and their loss.

    32 hexadecimal digits, as of a UUID, stand in the text, a token each, and are asked for behind it. As every digit is
    predicted from the right ones before it, all of the first k are likeliest just where greedy decoding makes them.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "right",
            "first digits of a string",
            higher=True,
            kind="share",
            floor=0.5,
            what="so many digits of a random string in the text are said exactly",
        ),
        Metric("digit_nll", "loss of a digit", "nats/digit", what="of a random string in the text; 2.77 by guessing"),
    )

    fed: int = 64

    def drawn(self, run: RunContext, length: int) -> dict[str, list[tuple[Any, Any]]]:
        def make() -> dict[str, list[tuple[Any, Any]]]:
            contexts, samples = self.contexts(run), []
            rng, tokenizer = run.rng(exact_string=length), contexts.tokenizer
            digits = [encode(tokenizer, digit)[-1] for digit in _DIGITS]
            said, asked = encode(tokenizer, _SAID), encode(tokenizer, _ASKED)
            size = len(said) + _LENGTHS[-1]
            for whole, _, _ in contexts.plain("exact_string", length, self.samples, 1):
                code = [digits[int(i)] for i in rng.integers(0, len(digits), _LENGTHS[-1])]
                at = int(rng.integers(1, length - size))
                body = whole[: length - size]
                samples.append((np.concatenate([body[:at], said, code, body[at:]]), np.array([*asked, *code])))
            return {"code": samples}

        key = ("exact string", length, self.samples)
        return cast(dict[str, list[tuple[Any, Any]]], run.kept(key, make))

    def judged(self, variant: str, logits: Tensor, fed: Tensor) -> Iterator[Judged]:
        wanted, logits = fed[:, -_LENGTHS[-1] :], logits[:, -_LENGTHS[-1] :]
        right = (logits.argmax(-1) == wanted).long().cumprod(1)
        for k in _LENGTHS:
            yield "right", {"digits": k}, right[:, k - 1].tolist()
        yield "digit_nll", {}, token_nll(logits, wanted).mean(1).tolist()
