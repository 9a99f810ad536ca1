# SPDX-License-Identifier: Apache-2.0
"""Every cache on a model with sliding-window layers, whose prompt is longer than the window: read in pieces, go on."""

import pytest
import torch

import manyheads
from manyheads import catalog, parse
from manyheads.integrations.transformers import new_cache, prefill
from oracles import models

# Need modules of a model of their own, or another kind of model.
OTHERS = {"attention_gate", "fastkvzip", "gist", "hcattention", "kvzap", "mla_hw", "kivi", "quarot"}
CACHES = sorted(
    row.slug for row in [*catalog.papers(), *catalog.baselines()]
    if row.category == "caches" and row.state != "planned" and row.slug not in OTHERS
)  # fmt: skip
BASES = {
    "kvzip": ("kvzip:instruct=false",),
    "graphkv": ("graphkv:base=snapkv",),
    "think": ("think:base=snapkv,budget=0.7", "think"),
}


def specs(slug):
    return BASES.get(slug, (slug,))


@pytest.mark.filterwarnings("ignore:knorm")
@pytest.mark.parametrize("spec", [spec for slug in CACHES for spec in specs(slug)])
def test_a_prompt_longer_than_the_window_is_gone_on_from(spec):
    """Pieces of several tokens and single ones after it; what is dropped by a window is dropped in every form kept."""
    model = models.tiny("gemma3_text")
    window = model.config.get_text_config().sliding_window
    ids, strategy = models.tokens(2, 6 * window + 2), parse(spec)
    with manyheads.use(model), torch.no_grad():
        cache = new_cache(model, strategy)
        prefill(model, ids[:, : 4 * window], cache)
        for piece in ids[:, 4 * window - 1 :].split([5, 1, 1, 4, *[1] * (2 * window - 8)], 1):
            assert torch.isfinite(model(input_ids=piece, past_key_values=cache).logits).all()
