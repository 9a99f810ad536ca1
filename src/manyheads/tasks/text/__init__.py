# SPDX-License-Identifier: Apache-2.0
"""Tasks on text, for causal language models as they are."""
