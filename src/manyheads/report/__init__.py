# SPDX-License-Identifier: Apache-2.0
"""What was measured, as a page and as a table in the terminal.

The parts are :mod:`.page` (a page made of sections), :mod:`.plots` (pictures), :mod:`.table` (tables for both) and
:mod:`.grids` (images side by side). The files named after a verb say which of them it shows, from which of its data.
"""
