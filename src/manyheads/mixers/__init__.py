# SPDX-License-Identifier: Apache-2.0
"""Token mixers: layers in the place of softmax attention in models trained from scratch; a file or folder each."""
