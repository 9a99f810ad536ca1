# SPDX-License-Identifier: Apache-2.0
"""Tasks of models that read series of numbers: forecasts, body sensors, markets."""
