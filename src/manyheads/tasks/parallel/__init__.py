# SPDX-License-Identifier: Apache-2.0
"""Tasks on processes that share a sequence."""
