# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several folders of tests share: tiny models and pipelines, and what was measured of them."""
