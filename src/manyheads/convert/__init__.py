# SPDX-License-Identifier: Apache-2.0
"""Strategies that change a checkpoint for good, see :mod:`manyheads.conversion`."""
