# SPDX-License-Identifier: Apache-2.0
"""Tasks on several processes that share a sequence."""
