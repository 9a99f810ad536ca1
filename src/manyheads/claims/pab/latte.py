# SPDX-License-Identifier: Apache-2.0
"""What ``pab.rivals`` asks, on the shipped Latte, the paper's kind of model, with the rivals that run on it."""

from .rivals import rivals

claim = rivals(
    "pab.latte", "moving", ("taylorseer", "fastercache"),
    "A small Latte of ours. FirstBlockCache and MagCache of diffusers 0.42 fail on a model whose blocks take frames "
    "and places in turn. FLOPs, not seconds, are made equal.",
)  # fmt: skip
