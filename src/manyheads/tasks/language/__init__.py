# SPDX-License-Identifier: Apache-2.0
"""Tasks of models that read and write text, trained from scratch or from published encoders."""
