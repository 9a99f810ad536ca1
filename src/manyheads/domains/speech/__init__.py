# SPDX-License-Identifier: Apache-2.0
"""Papers on speech: recognition, speakers, activity, understanding."""
