# SPDX-License-Identifier: Apache-2.0
"""Tasks on what heads do: on small models trained for a language whose answers are known, and on published ones."""
