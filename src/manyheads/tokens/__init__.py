# SPDX-License-Identifier: Apache-2.0
"""Papers on fewer tokens: merged, pooled or selected within a model, and restored."""
