# SPDX-License-Identifier: Apache-2.0
"""Datasets of LongBench (arXiv 2308.14508): what is asked in each, in our wording, and its score."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from importlib.util import find_spec

from ...errors import UserError

__all__ = ["DATASETS", "Dataset", "classification", "code_similarity", "count", "retrieval", "rouge_l", "token_f1"]

Score = Callable[[str, str, Sequence[str]], float]  # reply, answer, all classes: 0 to 1


def _bare(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD compares them."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def token_f1(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Harmonic mean of the shares of the reply's words and of the answer's that both have."""
    del classes
    one, two = _bare(reply), _bare(answer)
    same = sum((Counter(one) & Counter(two)).values())
    return 2 * same / (len(one) + len(two)) if same else 0.0


def rouge_l(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F-measure of ROUGE-L by the library that LongBench takes, ``rouge``: of the set of words that stand in a longest
    common subsequence of any two sentences, where rouge-score compares the texts as two sequences and finds far less.

    What the library cannot read (nothing, or a sentence of a thousand words) gets 0, as in the benchmark.

    Raises:
        UserError: the library is not installed.
    """  # fmt: skip
    del classes
    if find_spec("rouge") is None:
        raise UserError('ROUGE-L needs the library rouge; install it with `pip install "manyheads[longbench]"`')
    from rouge import Rouge

    try:
        return float(Rouge(["rouge-l"]).get_scores(reply, answer)[0]["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def classification(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes that the reply names, if the answer is one; parts of its name do not count.

    LongBench's own code passes over every second of such parts where several follow each other.
    """
    named = [one for one in classes if one in reply and not (one in answer and one != answer)]
    return 1 / len(named) if answer in named else 0.0


def _numbers(reply: str, wanted: str) -> float:
    said = re.findall(r"\d+", reply)
    return said.count(wanted) / len(said) if said else 0.0


def count(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the reply that are the answer."""
    del classes
    return _numbers(reply, answer.strip())


def retrieval(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the reply that are the number of the paragraph in the answer."""
    del classes
    found = re.search(r"Paragraph (\d+)", answer)
    return _numbers(reply, found[1]) if found else 0.0


def code_similarity(reply: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Ratio of matching letters of the reply's first line that is code and of the answer, in whole hundredths.

    By ``difflib``, as fuzzywuzzy, which LongBench takes, has it.
    """
    del classes
    lines = (line for line in reply.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//")))
    return round(100 * SequenceMatcher(None, next(lines, ""), answer).ratio()) / 100


@dataclass(frozen=True)
class Dataset:
    """What is asked in a dataset.

    Attributes:
        group: of the benchmark's six.
        before, after: what stands around the context; ``after`` has ``{input}`` where the question stands.
        score: of a reply and one of the answers; the best answer counts.
        reply: most tokens of a reply, as in the benchmark.
        plain: read without chat template, as worked examples and code are; of a reply in words the first line counts.
    """

    group: str
    before: str
    after: str
    score: Score
    reply: int
    plain: bool = False


_ONE, _MANY, _SUM, _SHOTS, _MADE, _CODE = (
    "one document", "many documents", "summary", "worked examples", "synthetic", "code",
)  # fmt: skip
_BRIEF = "Answer with a few words and nothing else.\n\nQuestion: {input}\n\nAnswer:"
_DOCUMENTS = "Read the documents and answer the question behind them.\n\n"
_SUMMARY = "Write a summary of {} on one page.\n\n"

DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset(_ONE, "Read the story and answer the question behind it.\n\n", _BRIEF, token_f1, 128),
    "qasper": Dataset(
        _ONE, "Read the scientific article and answer the question behind it.\n\n",
        'Answer in one sentence or a few words. If the article does not answer the question, write "unanswerable"; if '
        'it is a question of yes or no, write "yes", "no" or "unanswerable".\n\nQuestion: {input}\n\nAnswer:',
        token_f1, 128,
    ),
    "multifieldqa_en": Dataset(_ONE, "Read the text and answer the question behind it.\n\n", _BRIEF, token_f1, 64),
    "hotpotqa": Dataset(_MANY, _DOCUMENTS, _BRIEF, token_f1, 32),
    "2wikimqa": Dataset(_MANY, _DOCUMENTS, _BRIEF, token_f1, 32),
    "musique": Dataset(_MANY, _DOCUMENTS, _BRIEF, token_f1, 32),
    "gov_report": Dataset(_SUM, _SUMMARY.format("this report of a government"), "Summary:", rouge_l, 512),
    "qmsum": Dataset(
        _SUM, "Read the transcript of a meeting; a question about it follows.\n\n",
        "Answer in one or several sentences.\n\nQuestion: {input}\n\nAnswer:", rouge_l, 512,
    ),
    "multi_news": Dataset(_SUM, _SUMMARY.format("all these news"), "Summary:", rouge_l, 512),
    "trec": Dataset(_SHOTS, "Say of what type the question is. Examples:\n\n", "{input}", classification, 64, True),
    "triviaqa": Dataset(
        _SHOTS, "Answer the question by the passage, with the answer alone. Examples:\n\n", "{input}", token_f1, 32,
        True,
    ),
    "samsum": Dataset(_SHOTS, "Sum up the dialogue in a few sentences. Examples:\n\n", "{input}", rouge_l, 128, True),
    "passage_count": Dataset(
        _MADE, "Some of the paragraphs below are repeated. How many different ones are there?\n\n",
        "Write the number of different paragraphs and nothing else.\n\nNumber:", count, 32,
    ),
    "passage_retrieval_en": Dataset(
        _MADE, "Here are 30 paragraphs; a summary of one of them follows.\n\n",
        'Summary: {input}\n\nWhich paragraph is it a summary of? Write its name, as "Paragraph 1".\n\nAnswer:',
        retrieval, 32,
    ),
    "lcc": Dataset(_CODE, "", "{input}Next line of code:\n", code_similarity, 64, True),
    "repobench-p": Dataset(_CODE, "", "{input}Next line of code:\n", code_similarity, 64, True),
}  # fmt: skip
