# SPDX-License-Identifier: Apache-2.0
"""Figures for pages, read from JSON files of results: no page states a measured figure that it does not take from here.

In a page, ``{{ figure("benchmarks/pab.json", "cpu", "overhead", "calls") }}`` is one figure. A path into a file is a
sequence of keys; a dict among them picks the one entry of a list whose fields are as given. ``table`` and ``pivot``
make tables of rows, ``machine`` says what a file was measured on and when, ``claim_lines`` what stored runs of all
claims say.

    python docs/_generate/measured.py README.md    # writes the block of measured costs again
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
COSTS = ROOT / "docs" / "_generate" / "costs.md"  # what README and the page of costs say


@cache
def _read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def _pick(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> Any:
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}, one is needed")
    return found[0]


def value(path: str, *keys: Any) -> Any:
    """What stands in a file at a path of keys.

    Raises:
        LookupError: nothing does, or several entries are as a dict asks.
    """
    node = _read(path)
    for key in keys:
        node = _pick(node, key) if isinstance(key, Mapping) else node[key]
    return node


def number(x: Any, digits: int = 3) -> str:
    """A value as pages write it: significant digits, thousands apart, a dash where there is none."""
    if x is None or isinstance(x, str):
        return x or "–"
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, int) or abs(x) >= 10**digits:
        return f"{round(x):,}"
    text = f"{x:.{digits}g}"
    return f"{x:.{digits}f}" if "e" in text else text


def figure(path: str, *keys: Any, scale: float = 1, digits: int = 3) -> str:
    """One figure, times ``scale``."""
    found = value(path, *keys)
    return number(found * scale if scale != 1 else found, digits)


def _field(row: Mapping[str, Any], dotted: str) -> Any:
    node: Any = row
    for name in dotted.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _matching(path: str, keys: Sequence[Any], where: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows whose fields are as given; a list of values means any of them."""
    rows = [
        row
        for row in value(path, *keys)
        if all(_field(row, name) in (v if isinstance(v, list) else [v]) for name, v in where.items())
    ]
    if not rows:
        raise LookupError(f"{path} has no row with {where}")
    return rows


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(path: str, *keys: Any, columns: Mapping[str, str], where: Mapping[str, Any] | None = None) -> str:
    """Rows of a file: ``columns`` gives headings by field, whose name may be dotted."""
    rows = _matching(path, keys, where or {})
    return _grid(list(columns.values()), [[number(_field(row, name)) for name in columns] for row in rows])


def pivot(
    path: str, *keys: Any, rows: Mapping[str, str], across: str, cell: str, where: Mapping[str, Any] | None = None,
    scale: float = 1,
) -> str:  # fmt: skip
    """One field of many rows: a line for each combination of the fields ``rows``, a column for each of ``across``."""
    found = _matching(path, keys, where or {})
    heads = list(dict.fromkeys(row[across] for row in found))
    cells = {(tuple(row.get(name) for name in rows), row[across]): _field(row, cell) for row in found}
    body = [
        [*map(number, line), *(number(None if (x := cells.get((line, h))) is None else x * scale) for h in heads)]
        for line in dict.fromkeys(line for line, _ in cells)
    ]
    return _grid([*rows.values(), *map(str, heads)], body)


def claim_lines(path: str) -> str:
    """What the deciding run of each claim says on each device and subject: the summary that the package has."""
    body = [
        [f"[{slug}](strategies/{slug.partition('.')[0]}.md)", on, line["line"], line["date"][:10]]
        for slug, lines in value(path).items()
        for on, line in lines.items()
    ]
    return _grid(["claim", "measured on", "checks", "date"], body)


def machine(path: str, *keys: Any, date: Sequence[Any] = ("date",)) -> str:
    """What a file was measured on, in words, and when."""
    found = value(path, *(keys or ("environment",)))
    processor = found["gpu"] or f"{found['cores']} cores of {found['cpu']}"
    versions = [f"{name} {found[name]}" for name in ("torch", "transformers", "triton") if found.get(name)]
    return f"{processor}, {', '.join(versions)}, {value(path, *date)}"


# ---- the cost model, and what was measured of the same


def _llama(length: int, card: str, what: str, pretrained: bool = False) -> Any:
    """Llama-3-8B's shape on a card; its weights count but for training, which takes more than one."""
    from manyheads.costs import Layer, Setting
    from manyheads.costs import card as named

    layer = Layer(length=length)
    return Setting(layer=layer, card=named(card), what=what, parameters=0 if what == "train" else 8_030_261_248,
                   pretrained=pretrained)  # type: ignore[arg-type]  # fmt: skip


def families_by_length(card: str, what: str, lengths: Sequence[int]) -> str:
    """Predicted milliseconds of the attention of Llama-3-8B's shape: a line for each family, a column a length."""
    from manyheads.costs import families, ranked

    found = {n: {one.entry.name: one for one in ranked(_llama(n, card, what))} for n in lengths}
    body = [
        [entry.title, f"`{entry.spec}`", *(number(1e3 * found[n][name].seconds) for n in lengths)]
        for name, entry in families().items()
        if name in found[lengths[0]]
    ]
    return _grid(["family", "to try", *(f"{n:,}" for n in lengths)], body)


def families_chosen(
    cards: Sequence[str], what: str, lengths: Sequence[int], pretrained: bool, among: Sequence[str] = ()
) -> str:
    """The fastest family that fits, by card and length; full attention where nothing is faster by a tenth."""
    from manyheads.costs import ranked

    body = []
    for card in cards:
        line = [card]
        for n in lengths:
            found = ranked(_llama(n, card, what, pretrained), among)
            full = next(one for one in found if one.entry.name == "full")
            kept = full.fits and full.seconds < 1.1 * found[0].seconds
            best = full if kept else found[0]
            line.append(f"`{best.entry.spec}`" if best.fits else "nothing fits")
        body.append(line)
    return _grid(["card", *(f"{n:,}" for n in lengths)], body)


def stored_and_predicted() -> list[tuple[str, str, float, float]]:
    """Measurements in ``benchmarks/`` that a formula speaks of: what, card, predicted and measured seconds."""
    from manyheads.attention.mla import platform_of, seconds
    from manyheads.costs import Layer
    from manyheads.costs.linear import Decay
    from manyheads.costs.sparse import Softmax, Sparse
    from manyheads.costs.stored import Quantised

    found = []

    def add(what: str, path: str, stages: Any, measured: float) -> None:
        gpu = value(path, "environment", "gpu")
        found.append((what, gpu, seconds(stages, platform_of(gpu)), measured))

    path = "benchmarks/decode.json"
    kinds: Any = {"sdpa auto": Softmax(), "bf16": Softmax(), "int4": Quantised(bits=4), "fp8": Quantised(bits=8)}
    for row in value(path, "rows"):
        kind = kinds.get(row["attention"])
        if kind is not None and isinstance(row["keys"], int):  # others hold rows of several lengths
            layer = Layer(length=row["keys"], batch=row["batch"])
            add(f"a token, {row['attention']}", path, kind.step(layer), 1e-6 * row["us"])
    path = "benchmarks/decay_attention.json"
    kinds = {"lightning": Decay(), "sdpa flash": Softmax()}
    for row in value(path, "rows"):
        if row["kind"] == "length" and row["attention"] in kinds and row.get("forward_graph_ms"):
            layer = Layer(length=row["length"], batch=row["batch"], heads=16, kv_heads=16)
            forward, backward = (getattr(kinds[row["attention"]], way)(layer) for way in ("forward", "backward"))
            add(f"forward, {row['attention']}", path, forward, 1e-3 * row["forward_graph_ms"])
            add(f"forward and backward, {row['attention']}", path, (*forward, *backward), 1e-3 * row["both_graph_ms"])
        elif row["kind"] == "step" and row["attention"] == "ours":
            layer = Layer(length=1, batch=row["batch"], heads=16, kv_heads=16)
            add("a token, lightning", path, Decay().step(layer), 1e-6 * row["us"])
    for path in ("benchmarks/block_sparse.json", "benchmarks/block_sparse_turns.json"):
        for row in value(path, "rows"):
            if row["attention"] in ("kernel", "sdpa cudnn"):
                layer = Layer(length=32768, heads=16, kv_heads=16)
                kind = Sparse(density=row["density"]) if row["attention"] == "kernel" else Softmax()
                stages = (*kind.forward(layer), *kind.backward(layer))
                what = f"{row['way']} kernel, blocks given" if row["attention"] == "kernel" else row["attention"]
                add(f"forward, {what}", path, kind.forward(layer), 1e-3 * row["forward_ms"])
                if "both_ms" in row:
                    add(f"forward and backward, {what}", path, stages, 1e-3 * row["both_ms"])
    path = "benchmarks/dhsa_prefill.json"
    for row in value(path, "rows"):
        if row["spec"] == "dhsa:budget=2048":
            layer = Layer(length=row["length"])
            add("forward, sdpa flash, long", path, Softmax().forward(layer), 1e-3 * row["flash_ms"])
            kind = Sparse(keys=2048, chosen=True)
            add("forward, 2048 keys, blocks given", path, Sparse(keys=2048).forward(layer), 1e-3 * row["read_ms"])
            add("forward, dhsa with what it chooses", path, kind.forward(layer), 1e-3 * row["ms"])
    return found


def families_checked() -> str:
    """Predicted over measured, by what was measured: median, least and most."""
    groups: dict[tuple[str, str], list[float]] = {}
    for what, gpu, predicted, found in stored_and_predicted():
        groups.setdefault((what, gpu), []).append(predicted / found)
    body = [
        [what, gpu, str(len(x)), number(sorted(x)[len(x) // 2], 2), number(min(x), 2), number(max(x), 2)]
        for (what, gpu), x in groups.items()
    ]
    return _grid(["measured", "card", "shapes", "predicted / measured", "least", "most"], body)


def families_timed(path: str, size: str, place: str) -> str:
    """Predicted over measured of a run of the claim: a line for each operator, a column for each length."""
    rows = [
        row for row in value(path, "runs", {"size": size}, "figures")
        if row["metric"] == "bias" and place in row["at"] and "length" in row["at"]
    ]  # fmt: skip
    lengths = sorted({row["at"]["length"] for row in rows})
    cells = {(row["at"][place], row["at"]["length"]): 2 ** row["estimate"]["value"] for row in rows}
    names = dict.fromkeys(name for name, _ in cells)
    body = [[name, *(number(cells.get((name, n)), 2) for n in lengths)] for name in names]
    return _grid([place, *(f"{n:,}" for n in lengths)], body)


def taxonomy() -> str:
    """Every family with its group, its strategies and its sources."""
    from manyheads.costs import families

    body = [
        [
            one.title, one.group, one.exactness, ", ".join(f"[`{m}`](strategies/{m}.md)" for m in one.members),
            ", ".join(f"[{cited}](https://arxiv.org/abs/{cited})" for cited in one.cites),
        ]
        for one in families().values()
    ]  # fmt: skip
    return _grid(["family", "group", "against softmax", "strategies", "sources"], body)


def render(text: str, **more: Any) -> str:
    """A page with its figures put in.

    Raises:
        LookupError, jinja2.TemplateError: a figure that is not there.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    functions = (figure, table, pivot, machine, claim_lines, families_by_length, families_chosen, families_checked,
                 families_timed, taxonomy)  # fmt: skip
    names: dict[str, Any] = {one.__name__: one for one in functions}
    return environment.from_string(text).render(**names, **more)


def with_costs(text: str) -> str:
    """``text`` with its block of measured costs made anew."""
    block = render(COSTS.read_text(encoding="utf-8"))
    return BLOCK.sub(lambda found: found[1] + block + found[2], text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(with_costs(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
