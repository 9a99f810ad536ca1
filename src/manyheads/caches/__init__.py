# SPDX-License-Identifier: Apache-2.0
"""What a site remembers between steps: eviction, one file per paper."""
