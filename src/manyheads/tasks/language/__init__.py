# SPDX-License-Identifier: Apache-2.0
"""Tasks of models that read and write text: choosing replies, translation."""
