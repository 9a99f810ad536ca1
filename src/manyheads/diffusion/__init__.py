# SPDX-License-Identifier: Apache-2.0
"""Strategies that steer generation: guidance, editing and caching in denoisers, one file per paper."""
