# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads lm-eval``: lm-eval's own command line, which knows the model ``manyheads`` here."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import typer

from manyheads.errors import UserError

from .options import passive_threads

app = typer.Typer(add_completion=False)


@app.command(
    add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)  # fmt: skip
def lm_eval(ctx: typer.Context) -> None:
    """Run lm-eval under a strategy: --model_args pretrained=MODEL,strategy=SPEC --tasks ...; all options are lm-eval's.

    Without --model it is manyheads. --help shows lm-eval's.
    """
    if find_spec("lm_eval") is None:
        raise UserError('this needs lm-eval; install it with `pip install "manyheads[lm-eval]"`')
    passive_threads()
    given = list(ctx.args)
    if any(name.startswith("--model_args") or name == "-a" for name in given) and not any(
        name.partition("=")[0] in ("--model", "-M") for name in given
    ):
        given += ["--model", "manyheads"]
    from lm_eval.__main__ import cli_evaluate

    import manyheads.lm_eval  # noqa: F401, registers the model

    typed, sys.argv = sys.argv, ["lm-eval", *given]
    try:
        cli_evaluate()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"lm-eval stopped: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = typed
