# SPDX-License-Identifier: Apache-2.0
"""Papers of a field: models that are trained on its tasks."""
