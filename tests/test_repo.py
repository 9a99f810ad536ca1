# SPDX-License-Identifier: Apache-2.0
"""The rules of the house, read off the source tree; each rule also meets a source that breaks it."""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from manyheads import catalog

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "manyheads"
CATEGORIES = {"mixers", "caches", "lenses", "diffusion", "decoding", "convert", "tokens", "parallel", "domains"}
# The parts of the package by floor, from the ground up; those of the design that are not there yet stand here too.
FLOORS = (
    {"errors", "environment", "files", "formatting", "html", "kernels", "progress", "workers"},
    {"attention"},
    {
        "call",
        "calls",
        "catalog",
        "causal_lens",
        "conditioning",
        "conversion",
        "costs",
        "denoising",
        "editing",
        "heads",
        "inpainting",
        "lens",
        "parallelism",
        "recipe",
        "reducing",
        "strategy",
        "text_reducing",
        "unlearning",
        "writing",
    },
    {"data", "integrations", "spec", *CATEGORIES},
    {"experiment", "models", "training"},
    {
        "converter",
        "generate",
        "head_selection",
        "inspect",
        "lm_eval",
        "material",
        "questions",
        "recipes",
        "shortening",
        "tasks",
    },
    {"claims", "comparison", "comparison_field", "comparison_rank", "comparison_train", "report"},
    {"commands"},
    {"__main__", "cli"},
)
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}
# What the parts may not import of their own floor or below; no category imports another.
FORBIDDEN = {
    **{category: CATEGORIES - {category} | {"integrations"} for category in CATEGORIES},
    **dict.fromkeys(("integrations", "inspect", "comparison", "report"), CATEGORIES),
}
# Papers of parallel/; what else is there is ground, on which models share tokens too.
SHARING = {paper.slug for paper in catalog.papers() if paper.category == "parallel"}
# Imports of a higher floor, from where to where, until what they take has moved down; the list only gets shorter.
UPWARD: set[tuple[str, str]] = set()
# Asked by name until the protocol of stores declares it; the list only gets shorter.
UNDECLARED: set[str] = set()
UNSAFE_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls of builtins by their bare name; `model.eval()` is an attribute and no matter here.
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}


@dataclass
class Source:
    """One Python file: its dotted name, its text and its syntax tree."""

    module: str
    text: str
    package: bool = False  # an __init__.py: relative imports start at the module itself

    def __post_init__(self):
        self.tree = ast.parse(self.text)
        self.found: dict[bool, list[tuple[int, str]]] = {}
        self.part = [*self.module.split("."), ""][1]

    def nodes(self, node: ast.AST, typing: bool = True) -> Iterator[ast.AST]:
        """Yield all nodes below one, except those that only a type checker sees where it is not asked for them."""
        for child in ast.iter_child_nodes(node):
            yield child
            if not (isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")) or typing:
                yield from self.nodes(child, typing)

    def imports(self, typing: bool = True) -> list[tuple[int, str]]:
        """Line and full dotted name of everything imported; `from a import b` gives `a.b`."""
        if typing not in self.found:
            self.found[typing] = list(self.all_imports(typing))
        return self.found[typing]

    def all_imports(self, typing: bool) -> Iterator[tuple[int, str]]:
        for node in self.nodes(self.tree, typing):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.module.split(".")[: None if self.package and node.level == 1 else -node.level]
                    if self.package and node.level > 1:
                        parents = self.module.split(".")[: 1 - node.level]
                    base = ".".join(filter(None, [*parents, base]))
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def read(path: Path) -> Source:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    package = parts[-1] == "__init__"
    return Source(".".join(parts[:-1] if package else parts), path.read_text(encoding="utf-8"), package)


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def acts(node: ast.AST) -> bool:
    """Whether a part of a class is a method that does something: the constructor and properties do not count."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    names = {ast.unparse(decorator) for decorator in node.decorator_list}
    return node.name != "__init__" and not names & {"property", "cached_property"}


def sizes(source: Source) -> Iterator[str]:
    if (count := len(source.text.splitlines())) > 400:
        yield f"file of {count} lines, 400 are allowed"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and lines(node) > 100:
            yield f"{node.lineno}: function {node.name} of {lines(node)} lines, 100 are allowed"
        if isinstance(node, ast.ClassDef):
            methods = sum(acts(part) for part in node.body)
            if lines(node) > 250:
                yield f"{node.lineno}: class {node.name} of {lines(node)} lines, 250 are allowed"
            if methods > 12:
                yield f"{node.lineno}: class {node.name} with {methods} methods, 12 are allowed"


def global_state(source: Source) -> Iterator[str]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Global):
            yield f"{node.lineno}: global {', '.join(node.names)}"


def safety(source: Source) -> Iterator[str]:
    for line, name in source.imports():
        if name.split(".")[0] in UNSAFE_MODULES:
            yield f"{line}: imports {name}"
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in UNSAFE_CALLS:
            yield f"{node.lineno}: calls {node.func.id}"
        loads = isinstance(node.func, ast.Attribute) and node.func.attr in ("load", "save")
        if loads and ast.unparse(node.func) in ("torch.load", "torch.save", "np.load", "numpy.load"):
            yield f"{node.lineno}: calls {ast.unparse(node.func)}, which pickles; use safetensors"
        for keyword in node.keywords:
            refused = {"trust_remote_code": False, "weights_only": True, "allow_pickle": False}
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if keyword.arg in refused and value is not refused[keyword.arg]:
                yield f"{node.lineno}: passes {keyword.arg}={ast.unparse(keyword.value)}"


def licence(source: Source) -> Iterator[str]:
    if not source.text.startswith("# SPDX-License-Identifier: Apache-2.0\n"):
        yield "the first line is not the SPDX line"


def triton_in_kernels_only(source: Source) -> Iterator[str]:
    for line, name in source.imports():
        if name.split(".")[0] == "triton" and source.part != "kernels":
            yield f"{line}: imports triton outside kernels/"


def arrows_point_down(source: Source) -> Iterator[str]:
    refused = FORBIDDEN.get(source.part, set())
    if source.part and source.part not in FLOOR:
        yield f"{source.part} stands on no floor"
    for line, name in source.imports():
        target = [*name.split("."), "", ""][:2]
        if target[0] != "manyheads" or not source.part:
            continue
        sharing = source.part in ("integrations", "parallelism") and target[1] == "parallel"
        if sharing and [*name.split("."), ""][2] not in SHARING:
            continue
        known = (source.module, name) in UPWARD or (source.module, name.rpartition(".")[0]) in UPWARD
        if target[1] in refused or (FLOOR.get(target[1], 0) > FLOOR.get(source.part, 0) and not known):
            yield f"{line}: {source.part} imports {name}"


def attributes_are_declared(source: Source) -> Iterator[str]:
    """What a strategy or a store can do is declared by its class: code asks isinstance, never for a name.

    A heuristic: getattr or hasattr with a literal name on something that is called strategy, policy, store or cache.
    """
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr") and len(node.args) > 1):
            continue
        asked = ast.unparse(node.args[0]).rpartition(".")[2].lower()
        fault = f"{ast.unparse(node.func)}({ast.unparse(node.args[0])}, {ast.unparse(node.args[1])})"
        literal = isinstance(node.args[1], ast.Constant)
        if literal and asked.endswith(("strategy", "policy", "store", "cache")) and fault not in UNDECLARED:
            yield f"{node.lineno}: {fault}"


def papers_stand_alone(source: Source) -> Iterator[str]:
    """A strategy file imports no other strategy, not even of its own category; what they share has an underscore.

    A claim or a recipe imports none but its own paper's; a task may measure what parts of any paper do.
    """
    from manyheads import catalog

    strategies = {row.module for row in [*catalog.papers(), *catalog.baselines()]}
    for line, name in source.imports():
        parts = name.split(".")
        for target in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):
            own = source.part == "tasks" or (
                source.part in ("claims", "recipes") and target.rpartition(".")[2] == source.module.rpartition(".")[2]
            )
            own = own or f"{source.module}.".startswith(f"{target}.")  # a part of the paper's own folder
            if target in strategies and not own:
                yield f"{line}: {source.module} imports the strategy {target}"


def integrations_name_no_strategy(source: Source) -> Iterator[str]:
    """An integration serves every strategy alike, so neither code nor prose names one; a slug may be a common word."""
    from manyheads import catalog

    if source.part != "integrations":
        return
    slugs = set(catalog.names()) - {"softmax", "full", "random"}
    for number, line in enumerate(source.text.splitlines(), 1):
        for word in slugs.intersection(re.findall(r"\w+", line)):
            yield f"{number}: names the strategy {word}"


RULES: dict[Callable[[Source], Iterator[str]], list[Source]] = {
    sizes: [
        Source("manyheads.a", "\n" * 401),
        Source("manyheads.a", "def f():\n" + "    pass\n" * 100),
        Source("manyheads.a", "class A:\n" + "    x = 1\n" * 250),
        Source("manyheads.a", "class A:\n" + "".join(f"    def f{i}(self): pass\n" for i in range(13))),
    ],
    global_state: [Source("manyheads.a", "def f():\n    global x\n    x = 1\n")],
    safety: [
        Source("manyheads.a", text)
        for text in (
            "import pickle",
            "from pickle import loads",
            "eval('1')",
            "exec('1')",
            "torch.load('x')",
            "load('x', weights_only=False)",
            "from_pretrained('x', trust_remote_code=True)",
            "from_pretrained('x', trust_remote_code=flag)",
            "load('x', allow_pickle=True)",
        )
    ],
    licence: [Source("manyheads.a", '"""A module."""\n')],
    triton_in_kernels_only: [
        Source("manyheads.attention.a", "def f():\n    import triton.language as tl\n"),
        Source("manyheads.a", "from triton import jit\n"),
    ],
    arrows_point_down: [
        Source("manyheads.caches.a", "from manyheads.integrations import use"),
        Source("manyheads.caches.a", "from ..report.table import Column"),
        Source("manyheads.caches.a", "def f():\n    from manyheads import integrations\n"),
        Source("manyheads.caches.a", "import manyheads.mixers.b"),
        Source("manyheads.domains.vision.a", "from ...caches import b"),
        Source("manyheads.caches", "from ..integrations import use", package=True),
        Source("manyheads.decoding.a", "from ..integrations.streams import Streams"),
        Source("manyheads.decoding.a.b", "if TYPE_CHECKING:\n    from ...integrations.cache import cache_arguments\n"),
        Source("manyheads.attention.a", "from ..caches.b import c"),
        Source("manyheads.integrations.transformers", "from ..caches.snapkv import SnapKV"),
        Source("manyheads.comparison", "from .caches import snapkv"),
        Source("manyheads.integrations.a", "from ..parallel.loongtrain import LoongTrain"),
        Source("manyheads.caches.a", "from ..parallel import World"),
        Source("manyheads.inspect.run", "from ..report import plots"),
        Source("manyheads.report.page", "def f():\n    from ..commands.options import console\n"),
        Source("manyheads.strategy", "def f():\n    from .spec import parse\n"),
        Source("manyheads.models.a", "if TYPE_CHECKING:\n    from ..tasks import load\n"),
        Source("manyheads.inspect.run", "from ..report.table import Column"),
        Source("manyheads.elsewhere.a", "import math"),
    ],
    attributes_are_declared: [
        Source("manyheads.tasks.a", 'getattr(arm.strategy, "sized", True)'),
        Source("manyheads.tasks.a", 'hasattr(policy, "mass")'),
        Source("manyheads.integrations.a", 'answer = getattr(self.own_store, "answer", None)'),
        Source("manyheads.integrations.a", 'hasattr(cache, "layers")'),
    ],
    papers_stand_alone: [
        Source("manyheads.caches.hashevict", "from .snapkv import SnapKV"),
        Source("manyheads.caches.hashevict", "from . import snapkv"),
        Source("manyheads.caches", "from . import snapkv", package=True),
        Source("manyheads.claims.hashevict", "from ..caches.snapkv import SnapKV"),
        Source("manyheads.recipes.hashevict", "from ..caches.snapkv import SnapKV"),
        Source("manyheads.caches.hashevict.part", "from ..snapkv.other import SnapKV"),
        Source("manyheads.diffusion.sag", "from .pab.redundancy import suggest"),
    ],
    integrations_name_no_strategy: [
        Source("manyheads.integrations.frames", 'manyheads.use(pipe, "pab:spatial=2")'),
        Source("manyheads.integrations", "# as h2o needs it", package=True),
    ],
}
ALLOWED = [
    Source("manyheads.caches.a", "from ..attention import merge\nfrom ._policy import Policy\nfrom . import _store\n"),
    Source("manyheads.caches", "from ._policy import Policy\nfrom ..call import Site\n", package=True),
    Source("manyheads.kernels.a", "import triton\n"),
    Source("manyheads.caches.hashevict.a", "from .b import C\nfrom . import d\nfrom ...call import Site\n"),
    Source("manyheads.diffusion.pab", "from .redundancy import suggest\n", package=True),
    Source("manyheads.diffusion.pab.redundancy", "from . import PAB\n"),
    Source("manyheads.integrations.a", "x.softmax(-1)\n"),
    Source("manyheads.claims.hashevict", "from ..caches.hashevict import HashEvict\n"),
    Source("manyheads.tasks.a", 'getattr(strategy, field.name)\ngetattr(module, "config", None)\n'),
    Source(
        "manyheads.tasks.a", "model.eval()\nre.compile('x')\nload('x', trust_remote_code=False, weights_only=True)\n"
    ),
]


@cache
def sources() -> list[Source]:
    return [read(path) for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert not [f"{source.module}: {fault}" for source in sources() for fault in rule(source)]


@pytest.mark.parametrize(
    ("rule", "bad"), [(rule, bad) for rule, examples in RULES.items() for bad in examples], ids=lambda value: ""
)
def test_the_rule_catches_what_breaks_it(rule, bad):
    assert list(rule(bad)), bad.text


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule is not licence], ids=lambda rule: rule.__name__)
def test_the_rule_allows_what_is_right(rule):
    assert not [fault for source in ALLOWED for fault in rule(source)]


def circles(sources: list[Source]) -> list[list[str]]:
    """Circles of imports, at module level or within functions; what only a type checker sees does not count."""
    known = {source.module for source in sources}
    imports = {
        s.module: {t for _, name in s.imports(typing=False) for t in (name, name.rpartition(".")[0]) if t in known}
        - {s.module}
        for s in sources
    }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in sorted(imports[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in sorted(known):
        visit(module, [])
    return found


def test_no_imports_run_in_a_circle():
    assert not circles(sources())


def test_a_circle_is_found():
    there = Source("manyheads.a", "from .b import c")
    assert circles([there, Source("manyheads.b", "def f():\n    from . import a\n")]) == [
        ["manyheads.a", "manyheads.b", "manyheads.a"]
    ]
    assert not circles([there, Source("manyheads.b", "if TYPE_CHECKING:\n    from . import a\n")])
    assert not circles([there, Source("manyheads.b", "from math import a")])


def test_exceptions_are_needed():
    """An exception that nothing needs any more goes."""
    taken = {(s.module, t) for s in sources() for _, name in s.imports() for t in (name, name.rpartition(".")[0])}
    assert taken >= UPWARD and all(FLOOR[a.split(".")[1]] < FLOOR[b.split(".")[1]] for a, b in UPWARD)
    text = "".join(ast.unparse(source.tree) for source in sources())
    assert not [asked for asked in UNDECLARED if asked.removesuffix(")") not in text]


def environment_names(sources: list[Source]) -> set[str]:
    """Names of environment variables that decide anything; a name that is computed counts as "?".

    A default that is set for another library decides nothing here.
    """
    names = set()
    for source in sources:
        for node in ast.walk(source.tree):
            key = None
            if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("os.environ", "environ"):
                key = node.slice
            elif isinstance(node, ast.Call) and node.args:
                called = ast.unparse(node.func)
                if re.fullmatch(r"(os\.)?(environ\.(get|pop)|getenv|putenv|unsetenv)", called):
                    key = node.args[0]
            if key is not None:
                names.add(key.value if isinstance(key, ast.Constant) else "?")
    return names


def test_at_most_three_environment_variables():
    names = environment_names(sources())
    assert len(names) <= 3 and "?" not in names, names
    assert environment_names([Source("manyheads.a", "os.environ.setdefault('A', '1')")]) == set()
    text = "import os\nos.environ['A']\nos.environ.get('B')\nos.getenv('C', '')\nos.environ[x] = '1'\n"
    assert environment_names([Source("manyheads.a", text)]) == {"A", "B", "C", "?"}


def repeated_share(sources: list[Source], window: int = 6) -> float:
    """Share of code lines in a run of `window` lines that occurs elsewhere too; imports do not count."""
    runs: Counter[tuple[str, ...]] = Counter()
    placed = []
    for source in sources:
        statements = [line.strip() for line in source.text.splitlines()]
        code = [line for line in statements if line and not re.match(r"#|from |import |[)\]}]+$", line)]
        windows = [tuple(code[i : i + window]) for i in range(len(code) - window + 1)]
        runs.update(windows)
        placed.append((len(code), windows))
    repeated = 0
    for _, windows in placed:
        covered = {i + offset for i, run in enumerate(windows) if runs[run] > 1 for offset in range(window)}
        repeated += len(covered)
    return repeated / max(1, sum(count for count, _ in placed))


def test_little_is_written_twice():
    assert repeated_share(sources()) <= 0.02
    body = "".join(f"x{i} = {i}\n" for i in range(10))
    assert repeated_share([Source("manyheads.a", body), Source("manyheads.b", body)]) == 1


def test_tests_carry_the_licence_too():
    paths = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert not [
        str(path) for path in paths if not path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    ]


def test_every_strategy_and_claim_has_its_row():
    """A file in a category is named by a slug of the catalogue, or starts with an underscore; so is a claim."""
    from manyheads import catalog

    rows = {row.module for row in [*catalog.papers(), *catalog.baselines()]}
    modules = {s.module for s in sources() if s.part in CATEGORIES and not s.package and "._" not in s.module}
    assert {m for m in modules if m not in rows and m.rpartition(".")[0] not in rows} == set()
    slugs = {
        s.module.split(".")[2]
        for s in sources()
        if s.part == "claims" and "." in s.module[10:] and "._" not in s.module
    }
    assert slugs <= set(catalog.names())


def test_data_files_are_packaged():
    """The wheel holds the whole package folder, so what the code reads must lie there and under version control."""
    assert (PACKAGE / "papers.toml").is_file() and (PACKAGE / "py.typed").is_file()
    assert 'packages = ["src/manyheads"]' in (ROOT / "pyproject.toml").read_text()
