# SPDX-License-Identifier: Apache-2.0
"""Python source of the packages installed beside this interpreter, as one stream of tokens per package.

The standard library is what the finished model is measured on, so nothing of it may be learned: its folder is never
read for training, and neither is any file that carries a good part of a standard-library file (vendored backports,
forks and compatibility copies; ``Overlap`` finds them by shared lines).
"""

import hashlib
import multiprocessing
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # id 0: begins every document
_REMOVED = {"distutils", "_distutils", "lib2to3", "blib2to3"}  # were standard library, in some versions still are
_SIZES = range(400, 600_000)  # bytes of a file worth reading
_SKIPPED_IN_STDLIB = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class Corpus:
    """What a model is trained on."""

    tokenizer: Tokenizer
    tokens: np.ndarray[Any, np.dtype[np.uint16]]  # packages one after another, files in the order of their paths
    bounds: np.ndarray[Any, np.dtype[np.int64]]  # [packages, 2], begin and end of each package in `tokens`
    packages: dict[str, int] = field(repr=False)  # name -> bytes of source kept
    words: tuple[str, ...] = field(repr=False)  # frequent lower-case words, most frequent first
    skipped: dict[str, int] = field(default_factory=dict)  # reason -> files not used


def site_packages() -> list[Path]:
    """Return the folders in which this interpreter's packages are installed."""
    return sorted({Path(sysconfig.get_paths()[kind]) for kind in ("purelib", "platlib")})


def standard_library() -> Iterator[Path]:
    """Yield every Python file of the running interpreter's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    yield from (p for p in sorted(root.rglob("*.py")) if not _SKIPPED_IN_STDLIB.intersection(p.relative_to(root).parts))


class Overlap:
    """Says whether a text carries a good part of one file of the standard library."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._stems = [file.stem for file in files]
        self._homes: dict[str, list[int]] = {}  # a distinctive line -> the files it stands in
        for number, file in enumerate(files):
            for line in _long_lines(_read(file) or ""):
                self._homes.setdefault(line, []).append(number)
        self._homes = {line: homes for line, homes in self._homes.items() if len(homes) <= 3}
        self._sizes = Counter(chain.from_iterable(self._homes.values()))

    def __call__(self, name: str, text: str) -> bool:
        """Whether ``text``, from a file called ``name``, shares a fifth of its or of a stdlib file's distinctive lines.

        A twentieth is enough when the two files have the same name. Fewer than five lines never are.
        """
        lines = _long_lines(text)
        shared = Counter(chain.from_iterable(self._homes.get(line, ()) for line in lines))
        return any(
            count >= 5
            and max(count / len(lines), count / self._sizes[number])
            >= (0.05 if Path(name).stem == self._stems[number] else 0.2)
            for number, count in shared.items()
        )


def _long_lines(text: str) -> set[str]:
    """Lines that say something: long, and no comment (licences stand in comments)."""
    return {line for line in map(str.strip, text.splitlines()) if len(line) >= 25 and line[0] != "#"}


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return None


class _Worker:
    """What runs in the pool: first judges files, then encodes them. One per process, built there."""

    overlap: Overlap
    tokenizer: Tokenizer

    @classmethod
    def start_judging(cls) -> None:
        cls.overlap = Overlap(list(standard_library()))

    @classmethod
    def judge(cls, path: str) -> tuple[str, str]:
        """Return (reason to skip it or "", digest of the content)."""
        file = Path(path)
        if _REMOVED.intersection(file.parts):
            return "standard library", ""
        if file.stat().st_size not in _SIZES:
            return "size", ""
        text = _read(file)
        if text is None:
            return "not UTF-8", ""
        if file.stem.endswith("_pb2") or len(text) > 120 * (text.count("\n") + 1):
            return "generated", ""
        if sum(map(str.isalpha, text[:20_000])) < 0.35 * min(len(text), 20_000):
            return "a table", ""
        if cls.overlap(file.name, text):
            return "standard library", ""
        return "", hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def start_encoding(cls, tokenizer: str) -> None:
        cls.tokenizer = Tokenizer.from_str(tokenizer)

    @classmethod
    def encode(cls, path: str) -> np.ndarray[Any, np.dtype[np.uint16]]:
        return np.array([0, *cls.tokenizer.encode(_read(Path(path)) or "").ids], np.uint16)


def _map(function: Callable[[str], Any], items: Sequence[str], start: Callable[..., None], *args: Any) -> list[Any]:
    """Apply ``function`` to all items on all processors, in order; in this process when there is little to do."""
    if len(items) < 500:
        start(*args)
        return [function(item) for item in items]
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with multiprocessing.get_context(method).Pool(os.cpu_count(), start, args) as pool:
        return pool.map(function, items, chunksize=64)


def read_files(roots: Sequence[Path], limit: int | None, seed: int) -> tuple[dict[str, list[str]], dict[str, int]]:
    """Return ({package: its usable files}, {reason: files skipped}) under ``roots``; ``limit`` draws that many files.

    A package is a folder or a module directly under a root. No content is taken twice.
    """
    package = {str(p): p.relative_to(root).parts[0] for root in roots for p in root.rglob("*.py") if p.is_file()}
    files = sorted(package)
    if limit is not None:
        files = sorted(Random(seed).sample(files, min(limit, len(files))))
    kept: dict[str, list[str]] = {}
    skipped: Counter[str] = Counter()
    seen: set[str] = set()
    for file, (reason, digest) in zip(files, _map(_Worker.judge, files, _Worker.start_judging), strict=True):
        if reason or digest in seen:
            skipped[reason or "a copy"] += 1
            continue
        seen.add(digest)
        kept.setdefault(package[file], []).append(file)
    return kept, dict(skipped)


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE in which every digit is a token of its own, so that a number is spelled out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build(
    roots: Sequence[Path],
    vocab_size: int,
    seed: int,
    limit: int | None = None,
    sample_mb: int = 48,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Read, judge, tokenise; without a tokenizer, train one on ``sample_mb`` megabytes of files drawn at random."""
    packages, skipped = read_files(roots, limit, seed)
    sizes = {name: sum(Path(f).stat().st_size for f in files) for name, files in packages.items()}
    drawn = list(chain.from_iterable(packages.values()))
    if not drawn:
        raise FileNotFoundError(f"no usable Python files under {', '.join(map(str, roots))}; give others with --data")
    Random(seed).shuffle(drawn)
    room = np.cumsum([Path(file).stat().st_size for file in drawn]) <= sample_mb * 1_000_000
    sample = [_read(Path(file)) or "" for file, fits in zip(drawn, room, strict=True) if fits]
    tokenizer = tokenizer or train_tokenizer(sample, vocab_size)
    words = Counter(w for text in sample[:2000] for w in text.split() if w.isascii() and w.isalpha() and w.islower())
    files = list(chain.from_iterable(packages.values()))
    encoded = _map(_Worker.encode, files, _Worker.start_encoding, tokenizer.to_str())
    lengths = iter([len(ids) for ids in encoded])
    ends = np.cumsum([sum(next(lengths) for _ in files) for files in packages.values()])
    return Corpus(
        tokenizer=tokenizer,
        tokens=np.concatenate(encoded),
        bounds=np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1),
        packages=sizes,
        words=tuple(w for w, _ in words.most_common() if 3 <= len(w) <= 10),
        skipped=skipped,
    )
