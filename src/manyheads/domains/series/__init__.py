# SPDX-License-Identifier: Apache-2.0
"""Papers on series of numbers: forecasts, body sensors, markets."""
