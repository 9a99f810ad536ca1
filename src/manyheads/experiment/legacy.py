# SPDX-License-Identifier: Apache-2.0
"""Reads results of claims that were stored before claims were data: a verdict in prose and figures of many kinds.

Their intervals were made in three ways that the files do not tell apart, so that each says ``not declared``.
"""

from __future__ import annotations

from typing import Any

__all__ = ["converted"]


def converted(data: dict[str, Any]) -> dict[str, Any]:
    """The contents of an old file as those of a new one; each run says ``legacy``."""
    return {"slug": data["slug"], "statement": data["statement"], "runs": [_run(run) for run in data["results"]]}


def _run(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "size": "quick" if run["quick"] else run["device"], "device": run["device"], "tier": "proxy", "checks": [],
        "figures": [_figure(figure) for figure in run["figures"]], "seeds": run["seeds"], "seconds": run["seconds"],
        "date": run["date"], "command": run["command"], "commit": None, "environment": run["environment"],
        "retracted": [], "legacy": {"verdict": run["verdict"], "reason": run["reason"]},
    }  # fmt: skip


def _figure(figure: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": "", "metric": figure["name"], "unit": figure["unit"], "arm": "", "at": {},
        "estimate": {
            "value": figure["value"], "low": figure["low"], "high": figure["high"], "n": figure["n"],
            "groups": figure["n"], "interval": "not declared",
        },
    }  # fmt: skip
