# SPDX-License-Identifier: Apache-2.0
"""Region codebook attention of an audio-driven video denoiser, and the human priors that it is trained with.

``priors`` has the four of the paper: body movement map, hand clarity score, pose-aligned reference, local supervision.
"""

from .cyberhost import CyberHost, RegionBlocks, gram_schmidt

__all__ = ["CyberHost", "RegionBlocks", "gram_schmidt"]
