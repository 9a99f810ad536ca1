# SPDX-License-Identifier: Apache-2.0
"""COMCAT: compression of vision transformers by the products of a head's weights, and customization by the same."""

from .adaptor import HeadAdaptor
from .comcat import COMCAT, HeadProducts
from .lora import LoRAAdaptor

__all__ = ["COMCAT", "HeadAdaptor", "HeadProducts", "LoRAAdaptor"]
