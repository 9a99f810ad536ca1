# SPDX-License-Identifier: Apache-2.0
"""Redundant image tokens keep a model from following instructions: fewer of them, and less attention of text to them.

"Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image Redundancy". It has two parts,
which go together as ``visual_redundancy + visual_redundancy.cmai``:

    visual_redundancy       VMTC: tokens that the tower's class token looks at stay, the rest is clustered and merged
    visual_redundancy.cmai  CMAI: from the decoder's second layer on, words do not see what their context did not

The paper uses both in tuning and afterwards. Its constants, and what is said in neither abstract nor reviews, are
inferred; each part says which.
"""

from .cmai import CMAI, focus, least_focused
from .visual_redundancy import VMTC, cosine_clusters

__all__ = ["CMAI", "VMTC", "cosine_clusters", "focus", "least_focused"]
