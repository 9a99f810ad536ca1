# SPDX-License-Identifier: Apache-2.0
"""Answers made up for tests: what a judge says of them, and values that tell it as well as is wanted."""

import numpy as np

from manyheads.data.known_answers import Question
from manyheads.inspect.answers import Answer


def drawn(count=120, told=1.0, by_heads=1.0, seed=0, wrong=0.5, kinds=("sums", "facts")):
    """Answers whose entropy tells the wrong ones by ``told`` deviations, and one head of four by ``by_heads``."""
    rng, made = np.random.default_rng(seed), []
    for i in range(count):
        right, tokens = bool(rng.random() >= wrong), int(rng.integers(1, 4))
        entropy = np.exp(rng.normal(0.0 if right else told, 1.0) + rng.normal(0, 0.1, tokens))
        heads = rng.uniform(0.3, 0.5, (2, 2, 2))
        heads[0, 1, 0] += 0.05 * rng.normal(by_heads if right else 0.0, 1.0)
        mass, lookback = (np.full(tokens, each.mean()) for each in heads)
        question = Question(f"question {i}", ("yes",), kind=kinds[i % len(kinds)], level="1")
        text = "yes" if right else "no"
        made.append(Answer(question, text, [text] * tokens, right, entropy, -entropy / 2, mass, lookback, heads))
    return made
