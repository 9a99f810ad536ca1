# SPDX-License-Identifier: Apache-2.0
"""The properties that every strategy of a kind must have, written once: functions of a model and a strategy.

A property raises AssertionError when it does not hold. Each has a negative control, a deliberately wrong strategy that
fails it, in the test file of the same name.
"""
