# SPDX-License-Identifier: Apache-2.0
"""Tasks of the field language: which of several replies fits a dialogue."""
