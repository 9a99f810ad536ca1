# SPDX-License-Identifier: Apache-2.0
"""Normalizers of attention from their formulas, one row at a time."""

import math

import torch


def literal(x, kind, alpha=1.5, k=3, s=0.3, temperature=1.0):
    """Weights of one row of logits that are all seen, by bisection and loops."""
    x, n = x / temperature, len(x)
    if kind == "sigmoid":
        return 1 / (1 + n * (-x).exp())
    if kind == "relu":
        return x.clamp(min=0) / n
    if kind == "topk":
        kept = set(sorted(range(n), key=lambda i: -float(x[i]))[:k])
        e = torch.stack([x[i].exp() if i in kept else torch.zeros_like(x[i]) for i in range(n)])
        return e / e.sum()
    if kind in ("softmax", "ssmax"):
        e = (x * (s * math.log(n) if kind == "ssmax" else 1.0)).exp()
        return e / e.sum()
    alpha = {"sparsemax": 2.0, "entmax15": 1.5}.get(kind, alpha)
    z = (alpha - 1) * x
    low, high = z.max() - 1, z.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (z - middle).clamp(min=0).pow(1 / (alpha - 1)).sum() > 1 else (low, middle)
    return (z - low).clamp(min=0).pow(1 / (alpha - 1))
