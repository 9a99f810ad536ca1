# SPDX-License-Identifier: Apache-2.0
"""Pages made of the catalogue: one a strategy, one a category, and the table of all papers."""

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from manyheads import catalog, claims
from manyheads.conditioning import DenoiserWeights
from manyheads.decoding._images import ImageDecoding
from manyheads.recipe import Procedure, Recipe
from manyheads.strategy import Attention, Mixer, Ranker, Strategy
from manyheads.unlearning import Unlearning
from manyheads.writing import Decoding

ABOUT = {
    "caches": "What a decoder keeps of the tokens it has read: which stay, in how many bits, where.",
    "mixers": "Layers that mix tokens, as softmax attention does, or variants of it; most are trained from scratch.",
    "lenses": "What heads do: statistics of attention, causal checks, and edits of heads in a model as it is.",
    "diffusion": "Image and video pipelines: reuse over steps, guidance through attention, editing, maps of words.",
    "decoding": "How tokens are chosen, and models that decode in several places at once.",
    "convert": "Changes of a checkpoint, for good: pruning, factorising, sharing, other attention in its place.",
    "tokens": "Fewer tokens inside a model: merged, pooled or selected.",
    "parallel": "One computation over several devices: sequences, heads or frames are shared out.",
    "domains": "Models of one field, trained: speech, vision, series, text and others.",
}
GUIDES = {
    "caches": "caches.md", "mixers": "mixers.md", "lenses": "lenses.md", "diffusion": "diffusion.md",
    "decoding": "decoding.md", "convert": "convert.md", "parallel": "diffusion.md#several-devices",
    "tokens": "tokens.md",
}  # fmt: skip
NEEDS = {"none": "no training", "calibration": "a calibration pass", "required": "training"}


def pages() -> Iterator[tuple[str, str]]:
    """Every generated page: its path in the site, and its Markdown."""
    rows = [*catalog.papers(), *catalog.baselines()]
    yield "strategies/index.md", overview()
    for category in top_categories():
        yield f"categories/{category}.md", category_page(category)
    for row in rows:
        if row.state != "planned":
            yield f"strategies/{row.slug}.md", strategy_page(row)


def top_categories() -> list[str]:
    """Categories without the fields of domains, sorted."""
    return sorted({name.split("/")[0] for name in catalog.categories()})


def overview() -> str:
    """The table of all papers and of what they are measured against."""
    papers, baselines = catalog.papers(), catalog.baselines()
    done = sum(row.state != "planned" for row in papers)
    return "\n".join([
        "# All strategies",
        "",
        f"{len(papers)} papers, {done} of them implemented, and {len(baselines)} baselines to measure them against. "
        "What a state means: [claims](../claims.md).",
        "",
        _table([*(row for row in papers if row.state != "planned"), *baselines], "../"),
        "",
        "## Planned",
        "",
        _table([row for row in papers if row.state == "planned"], "../"),
    ])  # fmt: skip


def category_page(category: str) -> str:
    """What is in a category."""
    rows = [r for r in [*catalog.papers(), *catalog.baselines()] if f"{r.category}/".startswith(f"{category}/")]
    guide = f" Guide: [{GUIDES[category].split('.')[0]}](../{GUIDES[category]})." if category in GUIDES else ""
    rows.sort(key=lambda row: (row.state == "planned", row.baseline, row.id or 0))
    return f"# Category: {category}\n\n{ABOUT[category]}{guide}\n\n{_table(rows, '../')}\n"


def _table(rows: list[catalog.Paper], up: str) -> str:
    head = ["| strategy | paper | category | title | what it does | state |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(_line(row, up) for row in rows)])


def _line(row: catalog.Paper, up: str) -> str:
    name = f"`{row.slug}`" if row.state == "planned" else f"[`{row.slug}`]({up}strategies/{row.slug}.md)"
    title = f"[{row.title}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else row.title
    number = "baseline" if row.baseline else row.id
    return f"| {name} | {number} | {row.category} | {title} | {row.summary} | {row.state} |"


def strategy_page(row: catalog.Paper) -> str:
    """One paper: what it is, its strategies with their fields, its claim and what runs of it found."""
    paper = f"[arXiv {row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else ""
    number = "baseline" if row.baseline else f"paper {row.id}"
    facts = [number, f"[{row.category}](../categories/{row.category.split('/')[0]}.md)", paper,
             f"needs {NEEDS[row.training]}", ", ".join(row.tags)]  # fmt: skip
    parts = [f"# {row.slug}", f"*{row.title}*", row.summary + ".", " · ".join(filter(None, facts))]
    module = ""
    for slug, cls in sorted(catalog.strategies(row.slug).items()):
        parts.append(f"## `{slug}`")
        text = inspect.getdoc(sys.modules[cls.__module__]) or ""
        if text != module:
            parts.append(markdown(text))
        module = text
        parts += [usage(slug, cls, row.category), fields(cls)]
    known = claims.of_paper(row.slug)
    parts += ["## Claim", claim_section(row.slug)]
    parts += [f"### `{slug}`\n\n{claim_section(slug)}" for slug in known if slug != row.slug]
    return "\n\n".join(parts) + "\n"


def usage(slug: str, cls: type[Strategy], category: str) -> str:
    """How it is written."""
    if issubclass(cls, Ranker):
        return f"```sh\nmanyheads compare --train --ranking cranfield --strategies {slug}\n```"
    if issubclass(cls, Mixer) and "causal" not in cls.directions:
        return f'```python\nfrom manyheads.models.encoder import Encoder\n\nmodel = Encoder("{slug}", config)\n```'
    if issubclass(cls, Mixer):
        return f"```sh\nmanyheads compare --train --strategies softmax,{slug}\n```"
    if issubclass(cls, Recipe | Procedure):
        return f"```sh\nmanyheads train {slug}\n```"
    if issubclass(cls, DenoiserWeights):
        return f"```sh\npython -m manyheads.recipes.{cls.recipe} --strategy {slug} --out FOLDER\n```"
    if issubclass(cls, Unlearning):
        return f"```sh\npython -m manyheads.recipes.unlearning_bench --method {slug}\n```"
    if issubclass(cls, ImageDecoding):
        return f'```python\nmanyheads.reply(model, processor, prompt, "{slug}", image=picture)\n```'
    if issubclass(cls, Decoding) and not issubclass(cls, Attention):
        return f'```python\nmanyheads.reply(model, tokenizer, prompt, "{slug}")\n```'
    what = "pipe" if category == "diffusion" else "model"
    return f'```python\nwith manyheads.use({what}, "{slug}"):\n    ...\n```'


def fields(cls: type[Strategy]) -> str:
    """Fields with their defaults and help."""
    lines = ["| field | default | what it is |", "|---|---|---|"]
    for f in dataclasses.fields(cls):
        default = "" if f.default is dataclasses.MISSING else f"`{f.default}`"
        lines.append(f"| `{f.name}` | {default} | {_cell(f.metadata.get('help', ''))} |")
    return "\n".join(lines)


def claim_section(slug: str) -> str:
    """What the claim of a paper says, what it judges, and what stored runs found."""
    if slug not in claims.slugs():
        return "No claim is written for it."
    found = claims.stored(slug)
    parts = [_claim(slug)]
    for result in found:
        for run in result.runs:
            parts += [f"**{run.size}, {run.measured}**: {run.line}", _checks(run)]
            parts += [f"Retracted: {_cell(e['check'])}: {e['word']}. {_cell(e['reason'])}." for e in run.retracted]
            if run.date:
                parts.append(f"`{run.command}`, {run.date[:10]}, {_machine(run.environment)}")
    if not found:
        parts.append("No run is stored yet.")
    parts.append(f"`manyheads claims run {slug}` checks it on your machine.")
    return "\n\n".join(filter(None, parts))


def _claim(slug: str) -> str:
    claim = claims.load(slug)
    said = claim.reported
    parts = [
        f"{claim.statement}",
        f"Tier: [{claim.tier}](../claims.md#tiers). The paper: {said.value}; {said.setting} ({said.where}).",
        "Checks:",
        "\n".join(f"- {_cell(str(check))}" for check in claim.checks),
    ]
    return "\n\n".join([*parts, claim.caveat])


def _checks(run: Any) -> str:
    if not run.checks:
        return ""
    lines = ["| check | effect | 95 % interval | word |", "|---|---|---|---|"]
    for check in run.checks:
        effect = check.effect
        value, around = (f"{effect.value:.3g}", f"{effect.low:.3g} to {effect.high:.3g}") if effect else ("", "")
        lines.append(f"| {_cell(check.check)} | {value} | {around} | {run.word(check)} |")
    return "\n".join(lines)


def _machine(environment: Any) -> str:
    return str(environment.get("gpu") or environment.get("cpu") or "unknown machine")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def markdown(docstring: str) -> str:
    """A docstring as Markdown: roles of reStructuredText become code, what could be HTML is escaped."""
    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", docstring)
    lines = []
    for line in text.splitlines():
        code = line.startswith("    ")
        lines.append(line if code else re.sub(r"(`[^`]*`)|<", lambda m: m[1] or "&lt;", line))
    return "\n".join(lines)
