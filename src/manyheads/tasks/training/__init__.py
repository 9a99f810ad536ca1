# SPDX-License-Identifier: Apache-2.0
"""Tasks that train a small decoder under every arm, or time one, on equal terms."""
