# SPDX-License-Identifier: Apache-2.0
"""The tiny model of these tests."""

from tiny import inspect

texts, tokenizer, model, folder, evil, seen, found, cli = (
    inspect.texts, inspect.tokenizer, inspect.model, inspect.folder, inspect.evil, inspect.seen, inspect.found,
    inspect.cli,
)  # fmt: skip
