# SPDX-License-Identifier: Apache-2.0
"""The tiny model of these tests."""

from tiny import compare

texts, tokenizer, model = compare.texts, compare.tokenizer, compare.model
