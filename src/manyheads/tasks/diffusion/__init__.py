# SPDX-License-Identifier: Apache-2.0
"""Tasks on generated images and videos, for pipelines of diffusers."""
