# SPDX-License-Identifier: Apache-2.0
"""Tasks on processes that share a sequence: what they send, what each holds, and how long it takes."""
