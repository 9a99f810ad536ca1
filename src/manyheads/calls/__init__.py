# SPDX-License-Identifier: Apache-2.0
"""What is done to an AttentionCall and asked of it: edits, and exact statistics of its weights."""
