# SPDX-License-Identifier: Apache-2.0
"""Token mixers: what stands in the place of softmax attention in a model trained from scratch, one file per paper."""
