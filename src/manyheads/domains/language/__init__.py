# SPDX-License-Identifier: Apache-2.0
"""Papers on language: choosing replies, translation."""
