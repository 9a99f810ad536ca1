# SPDX-License-Identifier: Apache-2.0
"""Tasks in a model's own chat template: what chat models are used for, scored by code."""
