# SPDX-License-Identifier: Apache-2.0
"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake in what the user gave: its text is one line saying what is wrong and what to do next.

    The command line prints it as ``error: <line>`` and exits with 2.
    """
