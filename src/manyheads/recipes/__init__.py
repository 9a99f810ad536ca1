# SPDX-License-Identifier: Apache-2.0
"""Training recipes: each makes one of the models that ship with the package, from nothing, in minutes."""
