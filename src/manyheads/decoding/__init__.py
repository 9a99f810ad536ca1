# SPDX-License-Identifier: Apache-2.0
"""Strategies that choose what a language model writes: one file or folder per paper."""
