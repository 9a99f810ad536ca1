# SPDX-License-Identifier: Apache-2.0
"""Token mixers side by side: a small language model trained from scratch for each, all on one budget."""
