# SPDX-License-Identifier: Apache-2.0
"""Generating under strategies: the command `manyheads generate`, and the page of attention maps."""
