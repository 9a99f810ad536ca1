# SPDX-License-Identifier: Apache-2.0
"""Loaders of data: text to compare strategies on."""
