# SPDX-License-Identifier: Apache-2.0
"""Importing manyheads loads little, which makes it quick, and changes nothing in another library."""

import subprocess
import sys

import pytest

import manyheads

HEAVY = {"torch", "transformers", "triton", "numpy", "pydantic", "matplotlib", "typer", "rich"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str) -> set[str]:
    return set(python(f"{code}\nimport sys; print('\\n' + ' '.join(sys.modules))").splitlines()[-1].split())


def test_import_loads_little():
    modules = loaded("import manyheads")
    assert not HEAVY & modules
    assert {name for name in modules if name.startswith("manyheads")} == {"manyheads"}


def test_mathematics_and_kernels_load_no_compiler():
    """Torch's compiler takes seconds to import: a kernel's first call would wait for it."""
    code = (
        "from importlib import import_module as load\nfrom pkgutil import iter_modules\n"
        "import manyheads.attention as a, manyheads.kernels as k\n"
        "for p in (a, k):\n    for m in iter_modules(p.__path__, p.__name__ + '.'): load(m.name)"
    )
    modules = loaded(code)
    assert {"manyheads.attention.sparse", "manyheads.kernels.block_sparse"} <= modules
    assert "torch._dynamo" not in modules
    assert "torch._dynamo" in loaded(code + "\nimport torch.nn.attention.bias")


@pytest.mark.parametrize(
    "arguments", [["list"], ["list", "--json"], ["find", "cache"], ["tasks"], ["claims", "--help"], ["--help"]]
)
def test_cheap_commands_load_no_torch(arguments):
    code = f"import sys\nfrom manyheads.cli import main\ntry: main({arguments!r})\nexcept SystemExit: pass"
    modules = loaded(code)
    strategies = {row.module for row in [*manyheads.papers(), *manyheads.baselines()]}
    assert not ({"torch", "transformers", "triton", "numpy", "matplotlib"} | strategies) & modules
    assert ("manyheads.compare" in modules) <= (arguments == ["--help"])
    assert ("pydantic" in modules) <= (arguments != ["--help"])


SNAPSHOT = """
import importlib, sys
names = ["torch", "torch.nn", "torch.nn.functional", "torch.Tensor", "torch.nn.Module", "transformers.cache_utils",
         "transformers.masking_utils", "transformers.modeling_utils", "transformers.models.llama.modeling_llama"]
def resolve(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        home, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(home), attribute)
places = {name: resolve(name) for name in names}
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
registries = {"attention": ALL_ATTENTION_FUNCTIONS, "masks": ALL_MASK_ATTENTION_FUNCTIONS}
def snapshot():
    seen = {(place, name): id(value) for place, owner in places.items() for name, value in list(vars(owner).items())}
    return seen | {(place, name): id(registry[name]) for place, registry in registries.items() for name in registry}
def changed(before, after):
    new = [key for key in after if key not in before and key[0] in registries]
    return new + [key for key, value in before.items() if after.get(key) != value]
"""


def test_import_changes_no_foreign_object():
    """A compression library replaces all attention functions of transformers when imported; this one must not."""
    out = python(
        SNAPSHOT
        + """
before = snapshot()
import manyheads, manyheads.catalog, manyheads.claims, manyheads.cli, manyheads.strategy
for row in [*manyheads.papers(), *manyheads.baselines()]:
    if row.state != "planned":
        manyheads.load(row.slug)
print("changed by manyheads", changed(before, snapshot()))
name = next(iter(ALL_ATTENTION_FUNCTIONS))
original = ALL_ATTENTION_FUNCTIONS[name]
ALL_ATTENTION_FUNCTIONS[name] = lambda *args, **kwargs: original(*args, **kwargs)
print("changed by the control", changed(before, snapshot()) == [("attention", name)])
"""
    )
    assert out.splitlines()[-2:] == ["changed by manyheads []", "changed by the control True"]


def test_public_names_resolve_lazily():
    from manyheads import catalog
    from manyheads.errors import UserError

    assert (
        manyheads.load("hashevict") is catalog.load("hashevict")
        and manyheads.UserError is UserError
        and manyheads.catalog is catalog
    )
    assert set(manyheads.__all__) <= set(dir(manyheads))
    assert callable(manyheads.parse) and callable(manyheads.use)


@pytest.mark.parametrize(("wrong", "nearest"), [("ues", "use"), ("Stratgy", "Strategy"), ("zzz", "parse")])
def test_wrong_name_is_answered_with_the_nearest(wrong, nearest):
    with pytest.raises(AttributeError, match=rf"no attribute '{wrong}'; nearest: .*\b{nearest}\b"):
        getattr(manyheads, wrong)
    assert not hasattr(manyheads, "__wrapped__")


def test_every_public_name_is_there():
    """Each name of ``__all__`` is imported from its home when it is asked for; `compare` is the function."""
    import manyheads

    assert all(getattr(manyheads, name) is not None for name in manyheads.__all__)
    assert callable(manyheads.compare) and callable(manyheads.compare_trained)


def test_texts_are_generated_without_diffusers():
    """It is an extra of images: a verb that serves both asks for it only where it makes some."""
    code = """
import importlib.util, sys
known = importlib.util.find_spec
def find_spec(name, *rest):
    return None if name.split(".")[0] == "diffusers" else known(name, *rest)
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}")
importlib.util.find_spec = find_spec
sys.meta_path.insert(0, Absent())
from manyheads.cli import main
asked = ["--model", "default", "def area(", "--strategy", "sampling:top_k=5"] if sys.argv[1:] else ["--strategy", "sag"]
try:
    main(["generate", *asked, "--max-new-tokens", "2"] if sys.argv[1:] else ["generate", *asked, "--prompt", "ghost"])
except SystemExit as stop:
    print("ended with", stop.code)
"""
    done = [
        subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, timeout=120)
        for given in (["text"], [])
    ]
    assert "def area(" in done[0].stdout and "ended with 0" in done[0].stdout, done[0].stderr
    assert "needs diffusers" in done[1].stderr and "ended with 0" not in done[1].stdout
