# SPDX-License-Identifier: Apache-2.0
"""Video-BLADE: block-sparse attention of video transformers, and what its choice of blocks is compared with."""

from .rival import Rival
from .video_blade import VideoBlade

__all__ = ["Rival", "VideoBlade"]
