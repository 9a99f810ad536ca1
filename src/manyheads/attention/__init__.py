# SPDX-License-Identifier: Apache-2.0
"""The mathematics that papers share: reference attention, slot storage of a cache, budgets."""
