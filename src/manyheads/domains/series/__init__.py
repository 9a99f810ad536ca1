# SPDX-License-Identifier: Apache-2.0
"""Papers that forecast series."""
