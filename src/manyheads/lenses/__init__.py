# SPDX-License-Identifier: Apache-2.0
"""Strategies that look at attention, and edits of heads: one file or folder per paper."""
