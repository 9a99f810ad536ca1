# SPDX-License-Identifier: Apache-2.0
"""Tasks of models that read images, alone or among text."""
