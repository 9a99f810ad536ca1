# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads inspect --lens hallucination_risk`` shows: risk and its bounds, detectors, and the curve of risk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..formatting import interval, number, percent
from .page import Figure, Headline, Page, Section, Text, made
from .plots import Panel, Series, lines
from .table import Cell, Column, Table, print_lines, print_table

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..experiment.estimates import Estimate
    from ..inspect.risk import RiskReport

__all__ = ["page", "print_report"]

_EXAMPLES = 12  # wrong answers that are shown
_DRAWN = ("entropy", "source mass", "uncertainty", "attention", "both")


def page(found: RiskReport) -> Page:
    """The page of a report."""
    run = found.run
    settings, model = run["settings"], run["model"]
    facts = [
        ("model", model["name"], f"{model['class']}, {model['parameters']:,} parameters, {model['dtype']}"),
        ("questions", settings["questions"], f"sha256 {run['texts']['sha256']}"),
        ("seed", settings["seed"], ""),
    ]
    care = Text(
        "AUROC is the chance that a wrong answer scores above a right one to a question of the same kind; 0.5 is "
        "guessing. Classifiers (uncertainty, attention, both) are judged on answers that they were not fitted on. The "
        "guarantee is for questions like these."
    )
    short = f"{model['name']} on {settings['device']}; {settings['questions']} questions; seed {settings['seed']}"
    return Page(
        model["name"], "How often are its answers made up, and can that be told?", short,
        [Headline(line, lead) for lead, line in _said(found)],
        [
            Section("Risk", [_risks(found), _bounds(found)]),
            Section("Detectors", [_detectors(found), care]),
            Section("What answering more costs", [_curve(found)]),
            Section("Wrong answers, surest first", [_examples(found)]),
            made(run, facts, "All figures are in findings.json beside this page.", "made in Python"),
        ],
    )  # fmt: skip


def print_report(found: RiskReport, place: Path, console: Console) -> None:
    """The tables, what follows, and where the page is."""
    for one in (_risks(found), _bounds(found), _detectors(found)):
        print_table(one, console)
    print_lines([*(line for _, line in _said(found)), f"page: {place}"], console)


def _said(found: RiskReport) -> list[tuple[str, str]]:
    """What was found, each with the word that leads it."""
    settings, whole, chosen = found.run["settings"], found.kinds["all"], found.chosen
    bound = min(found.bounds, key=lambda name: found.bounds[name])
    best = max(found.auroc, key=lambda name: found.auroc[name].value)
    told = f"Answers whose score of {chosen.detector} is above {number(chosen.value)} are to be held back"
    if chosen.wrong is None:
        told = (
            f"No threshold of {chosen.detector} is shown to keep wrong answers at {percent(settings['risk'])}: "
            "nothing is to be answered. Take a higher risk or more questions"
        )
    else:
        told += (
            f": {percent(chosen.answered)} of the answers not used to choose it are given, "
            f"{percent(chosen.wrong.value)} of those wrong ({_of(chosen.wrong, True)}), where "
            f"{percent(settings['risk'])} was allowed"
        )
    return [
        ("risk", f"{percent(whole.value)} of {whole.n} answers are wrong ({_of(whole, True)}); with probability "
         f"{1 - settings['delta']:g} the risk is below {percent(found.bounds[bound])} ({bound}). The probabilities of "
         f"answers miss the share right by {percent(found.calibration)} (expected calibration error)."),
        ("detector", f"Wrong answers are told best by {best}: AUROC {number(found.auroc[best].value)} "
         f"({_of(found.auroc[best])})."),
        ("threshold", f"{told}."),
    ]  # fmt: skip


def _of(found: Estimate, share: bool = False) -> str:
    return interval(found.low, found.high, share)


def _risks(found: RiskReport) -> Table:
    rows: list[list[Cell | str]] = [
        [kind, f"{one.n}", Cell(percent(one.value), _of(one, True))] for kind, one in found.kinds.items()
    ]
    columns = [Column("questions", text=True), Column("answers"), Column("wrong")]
    return Table(columns, rows, "answers that are wrong", repeats=True)


def _bounds(found: RiskReport) -> Table:
    rows: list[list[Cell | str]] = [[name, f"{100 * value:.1f} %"] for name, value in found.bounds.items()]
    settings = found.run["settings"]
    return Table(
        [Column("bound", text=True), Column("risk at most")], rows,
        f"bounds of the risk, each with probability {1 - settings['delta']:g}",
        f"PAC-Bayes with a KL divergence of {settings['kl']:g} nats", repeats=True,
    )  # fmt: skip


def _detectors(found: RiskReport) -> Table:
    rows: list[list[Cell | str]] = []
    best = max(found.auroc, key=lambda name: found.auroc[name].value)
    for name, one in found.auroc.items():
        at = found.thresholds[name]
        wrong = "–" if at.wrong is None else Cell(percent(at.wrong.value), _of(at.wrong, True))
        rows.append([
            name, Cell(number(one.value), _of(one), best=name == best), number(found.area(name)),
            number(at.value), percent(at.answered), wrong,
        ])  # fmt: skip
    columns = [
        Column("detector", text=True), Column("AUROC"), Column("mean risk"), Column("threshold"), Column("answered"),
        Column("of those\nwrong"),
    ]  # fmt: skip
    title = f"detectors, and thresholds for at most {percent(found.run['settings']['risk'])} wrong answers"
    return Table(columns, rows, title, "mean risk: over all shares that could be answered", repeats=True)


def _curve(found: RiskReport) -> Figure:
    names = dict.fromkeys((*_DRAWN, found.chosen.detector))
    drawn = [Series(name, *(axis.tolist() for axis in found.curves[name])) for name in names]
    allowed, whole = found.run["settings"]["risk"], found.kinds["all"].value
    panel = Panel(
        drawn, "", "share of questions answered", "wrong among them", level=(allowed, allowed, allowed, "allowed"),
        limits=(0.0, min(1.0, 1.3 * max(whole, allowed))),
    )  # fmt: skip
    said = ", ".join(f"{name} {found.area(name):.2f}" for name in names)
    return Figure(
        lines([panel], f"Risk over coverage; mean risk: {said}", width=640, height=340),
        "Answers in the order of a detector's score, surest first: how many of those given are wrong. A detector that "
        f"knows nothing stays at {percent(whole)}.",
    )  # fmt: skip


def _examples(found: RiskReport) -> Table:
    wrong = sorted((a for a in found.answers if not a.right), key=lambda a: float(a.entropy.mean()))[:_EXAMPLES]
    rows: list[list[Any]] = [
        [f"{_short(a.question.text)} {a.question.opening}", a.text.strip(), " or ".join(a.question.answers) or "none",
         number(float(a.entropy.mean())), number(float(a.mass.mean()))]
        for a in wrong
    ]  # fmt: skip
    columns = [
        Column("question", text=True), Column("said", text=True), Column("right", text=True), Column("entropy", "nats"),
        Column("source mass"),
    ]  # fmt: skip
    return Table(columns, rows, repeats=True)


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:80]} ... {text[-80:]}"
