# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads parallel``. What it needs is imported when it runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.progress import shown

from .options import Json, Out, Resume, Seed, console, passive_threads, print_json, resumed, typed

if TYPE_CHECKING:
    from manyheads.experiment import Results
    from manyheads.tasks.parallel.context_attention import ContextAttention

_UNITS = {"": 1, "k": 1 << 10, "M": 1 << 20}
_KIND = "parallel"


def parallel(
    world: Annotated[int | None, typer.Option(min=1, help="Processes. \\[default: 4; torchrun's]")] = None,
    backend: Annotated[str | None, typer.Option(help="gloo, or nccl with a GPU each. \\[default: gloo]")] = None,
    tokens: Annotated[str | None, typer.Option(help="Of all processes: 512, 32k, 4M. \\[default: 512]")] = None,
    masks: Annotated[str | None, typer.Option(help="Names of patterns, comma between. \\[default: all]")] = None,
    methods: Annotated[str | None, typer.Option(help="Names of methods, comma between. \\[default: all]")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Of queries. \\[default: 8; modelled: 64]")] = None,
    kv_heads: Annotated[int | None, typer.Option(min=1, help="Of keys. \\[default: 2; modelled: 8]")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels. \\[default: 64; modelled: 128]")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float64, float32, bfloat16 or float16. \\[default: float32; modelled: bfloat16]")
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="The gradients too.")] = False,
    node: Annotated[
        int | None, typer.Option(min=1, help="Processes of a machine. \\[default: all; modelled: the cluster's]")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="That are timed. \\[default: 3]")] = None,
    cluster: Annotated[str, typer.Option(help="That times are modelled for: h100 or a100.")] = "h100",
    model_only: Annotated[
        bool, typer.Option("--model-only", help="Start no process: count, and say modelled times.")
    ] = False,
    efficiency: Annotated[
        Path | None,
        typer.Option(help="Measured curve (benchmarks/parallel_efficiency.py) in place of the assumed one."),
    ] = None,
    seed: Seed = None,
    out: Out = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Attention over tokens that processes share: errors, bytes, balance and time of each method on each mask.

    manyheads parallel --world 4 --backward

    torchrun --nproc-per-node 8 -m manyheads parallel --backend nccl --tokens 64k --dtype bfloat16

    manyheads parallel --model-only --world 1024 --tokens 4M --cluster h100
    """
    given: dict[str, Any] = {
        "world": world, "backend": backend, "tokens": tokens, "masks": masks, "methods": methods, "heads": heads,
        "kv_heads": kv_heads, "width": width, "dtype": dtype, "backward": backward or None, "node": node,
        "rounds": rounds, "seed": seed,
        "cluster": None if cluster == "h100" else cluster,
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None}
    if model_only:
        if wrong := [name for name in ("backend", "rounds") if name in options]:
            raise UserError(f"--model-only starts no process: leave --{wrong[0]} away")
        if resume is not None:
            raise UserError("--model-only takes seconds and keeps no journal: leave --resume away")
        _show_model(options, efficiency, out, as_json)
        return
    if efficiency is not None:
        raise UserError("--efficiency goes with --model-only; add it")
    _measure(options, out, resume, as_json)


def _measure(options: dict[str, Any], out: Path | None, resume: Path | None, as_json: bool) -> None:
    passive_threads()
    from manyheads.experiment import Results
    from manyheads.experiment.journal import folder_for
    from manyheads.tasks.parallel import _launch

    if resume is not None:
        options, out = resumed(resume, out, options, (_KIND,), "parallel")
    task = _task(options)
    if not _launch.leads(task.backend):
        _launch.serve(task.backend)
        return
    folder, finished = folder_for(out, options)
    if finished:
        results = Results.read(folder)
    else:
        with shown(as_json) as progress:
            results = _results(task, options, folder, progress)
    from manyheads.report.page import write
    from manyheads.report.parallel import document, page, print_results

    write(page(results), results.report)
    if as_json:
        print_json(document(results))
    else:
        print_results(results, console(200))


def _results(task: ContextAttention, options: dict[str, Any], folder: Path, progress: Any) -> Results:
    from manyheads.environment import commit
    from manyheads.experiment import Experiment
    from manyheads.experiment.runner import run
    from manyheads.tasks.parallel.context_attention import ARMS

    wanted = _methods(options)
    arms = [arm for arm in ARMS if arm.name in wanted]
    plan = Experiment(subject="processes", arms=tuple(arms), baseline=arms[0], tasks=(task,), equal="none").at("cpu")
    about = {"command": typed(), "options": options, "kind": _KIND, "commit": commit()}
    return run(plan, folder, seed=options.get("seed", 0), progress=progress, about=about)


def _task(options: dict[str, Any]) -> ContextAttention:
    from manyheads.tasks.parallel import _launch
    from manyheads.tasks.parallel.context_attention import ContextAttention

    names = ("backend", "heads", "kv_heads", "width", "dtype", "backward", "node", "rounds", "cluster")
    fields = {name: options[name] for name in names if name in options}
    here = _launch.size(options.get("backend", "gloo")) if _launch.started() else 4
    if _launch.started() and options.get("world", here) != here:
        raise UserError(f"torchrun has started {here} processes: give --world {here}, or leave it away")
    if "tokens" in options:
        fields["tokens"] = _tokens(options["tokens"])
    return ContextAttention(
        ranks=options.get("world", here), masks=tuple(_items(options.get("masks"))), seed=options.get("seed", 0),
        **fields,
    )  # fmt: skip


def _show_model(options: dict[str, Any], efficiency: Path | None, out: Path | None, as_json: bool) -> None:
    import dataclasses

    from manyheads.environment import environment
    from manyheads.report.parallel import modelled_page, print_modelled
    from manyheads.tasks.parallel._modelled import Setting, modelled, read_efficiency

    names = ("heads", "kv_heads", "width", "dtype", "node", "cluster", "seed", "backward")
    fields = {name: options[name] for name in names if name in options}
    if efficiency is not None:
        fields["efficiency"] = read_efficiency(efficiency)
    setting = Setting(ranks=options.get("world", 64), tokens=_tokens(options.get("tokens", "512k")), **fields)
    masks, methods, rows = _items(options.get("masks")) or list(_patterns()), _methods(options), []
    with shown(as_json) as progress:
        for number, name in enumerate(masks):
            progress(number, len(masks), name)
            rows += list(modelled(setting, [name], methods))
    said = dataclasses.asdict(setting) | {"node": setting.of_machine, "efficiency": setting.efficiency.source}
    found = {"setting": said, "rows": rows, "command": typed(), "environment": environment()}
    if out is not None:
        from manyheads.report.page import write

        out.mkdir(parents=True, exist_ok=True)
        write(modelled_page(found, found), out / "report.html")
    if as_json:
        print_json(found)
    else:
        print_modelled(found, console(170))


def _patterns() -> list[str]:
    from manyheads.parallel import PATTERNS

    return list(PATTERNS)


def _methods(options: dict[str, Any]) -> list[str]:
    from manyheads.parallel._methods import METHODS, method

    wanted = _items(options.get("methods"))
    for name in wanted:
        method(name)
    return wanted or list(METHODS)


def _items(text: str | None) -> list[str]:
    """Names with commas between them; none where all are meant."""
    return [] if text in (None, "all") else [name.strip() for name in (text or "").split(",") if name.strip()]


def _tokens(text: str) -> int:
    found = re.fullmatch(r"(\d+)([kM]?)", text)
    if not found or not int(found[1]):
        raise UserError(f"a number of tokens is 512, 32k (of 1,024) or 4M (of 1,048,576), not {text!r}")
    return int(found[1]) * _UNITS[found[2]]
