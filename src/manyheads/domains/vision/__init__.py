# SPDX-License-Identifier: Apache-2.0
"""Papers on images: bags of patches, objects and their boxes, a light backbone."""
