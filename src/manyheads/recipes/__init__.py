# SPDX-License-Identifier: Apache-2.0
"""Training recipes: the models that ship with the package, from nothing, and what strategies train on any."""
