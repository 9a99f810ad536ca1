# SPDX-License-Identifier: Apache-2.0
"""Tasks of models that read speech, trained from scratch on real recordings."""
