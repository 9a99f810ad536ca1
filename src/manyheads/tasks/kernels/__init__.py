# SPDX-License-Identifier: Apache-2.0
"""Tasks on operators: what they cost on the machine at hand."""
