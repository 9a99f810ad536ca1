# SPDX-License-Identifier: Apache-2.0
"""AdaToken-3D: a decoder drops tokens of a scene by what it attends to; and what flows from them, as it is."""

from .contributions import idle, needed, received, schedule_of
from .flow import Flow
from .spatial_gating import By, SpatialGating

__all__ = ["By", "Flow", "SpatialGating", "idle", "needed", "received", "schedule_of"]
