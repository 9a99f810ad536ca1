# SPDX-License-Identifier: Apache-2.0
"""The thirteen tasks of RULER (arXiv 2404.06654), each a file; wording and word lists are our own."""
