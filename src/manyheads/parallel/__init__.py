# SPDX-License-Identifier: Apache-2.0
"""Attention on several devices: how tokens are shared among processes, and what these exchange."""

from ._frames import FrameParallel, Traffic

__all__ = ["FrameParallel", "Traffic"]
