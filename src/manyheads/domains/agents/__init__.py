# SPDX-License-Identifier: Apache-2.0
"""Papers on agents that decide: bidding."""
