# SPDX-License-Identifier: Apache-2.0
"""Tasks of models that forecast series, trained on what came before and judged on what came after."""
