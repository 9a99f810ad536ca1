# SPDX-License-Identifier: Apache-2.0
"""The verbs of the command line, a file each: they read options, have something computed, and have it shown."""
