# SPDX-License-Identifier: Apache-2.0
"""Which rows of a denoiser's batch are conditional, unconditional or another guidance's: as the pipeline says it.

It says it in one of these places, asked in this order; where none tells, the rows are ``unknown``, and what has to know
them refuses:

1. the name of the context that it runs its denoiser in, or the batch that its guider made;
2. an argument of the denoiser that only the prediction of another guidance has (``skip_layers``);
3. the order in which the mixin for perturbed-attention guidance lays out its batches;
4. the rows of the prompt's embeddings, which are those of its call or of its ``encode_prompt``, and the negative
   prompt's, by their values;
5. the statement of its call that takes a prediction apart: ``noise_pred_uncond, noise_pred_text = x.chunk(2)``.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers.pipelines.pag.pag_utils import PAGMixin
from torch import Tensor

__all__ = ["UNKNOWN", "PromptRows", "guidance_of", "of_one_sample", "rescales", "rows_of", "tensors_of"]

UNKNOWN = ("unknown",)
_PLAIN = (("uncond", "cond"), ("cond", "uncond"), ("cond",), ("uncond",))
Branches = tuple[str, ...]


class PromptRows:
    """Embeddings of prompts and of negative prompts that a pipeline was given or made, the latest."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._found: list[tuple[Tensor, set[Branches]]] = []

    def clear(self) -> None:
        """Forget them."""
        self._pairs, self._found = [], []

    def add(self, named: dict[str, Any]) -> None:
        """Take every tensor of ``named`` with its negative, ``x`` and ``negative_x``."""
        for name, negative in named.items():
            own = named.get(name.removeprefix("negative_"))
            if name.startswith("negative_") and isinstance(own, Tensor) and isinstance(negative, Tensor):
                self._pairs, self._found = [*self._pairs[-15:], (own, negative)], []

    def add_returned(self, function: Any, result: Any) -> None:
        """Take what a method of a pipeline returned, under the names that its ``return`` has for it."""
        values = result if isinstance(result, tuple) else (result,)
        names = _returned(inspect.unwrap(function), len(values))
        self.add(dict(zip(names, values, strict=False)))

    def fitting(self, given: dict[str, Any]) -> set[Branches]:
        """What the rows of a denoiser's arguments can be; empty where nothing tells."""
        conditions = {name: value for name, value in given.items() if name != "timestep"}
        found = [fits for x in tensors_of(conditions) if x.ndim and (fits := self._fits(x))]
        return set.intersection(*found) if found else set()

    def _fits(self, x: Tensor) -> set[Branches]:
        """The same by one argument."""
        if (known := next((fits for seen, fits in self._found if seen is x), None)) is not None:
            return known
        pairs = [(a, b) for a, b in self._pairs if a.shape[1:] == x.shape[1:] == b.shape[1:]]
        if not pairs:
            return set()
        among = {name: _among(x, [pair[i] for pair in pairs]) for i, name in enumerate(("cond", "uncond"))}
        fits: set[Branches] = {names for names in _PLAIN if _fits(names, among)}
        self._found = [*self._found[-15:], (x, fits)]
        return fits


def tensors_of(given: Any) -> Iterator[Tensor]:
    """Every tensor among the arguments of a denoiser, in their order."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (dict, list, tuple)):
        for value in given.values() if isinstance(given, dict) else given:
            yield from tensors_of(value)


def _among(x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Which rows of ``x`` ``[R, ...]`` are among others, ``[R]``."""
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for row in (row for each in rows for row in each.to(x.device, x.dtype)):
        found |= (x == row).reshape(len(x), -1).all(1)
    return found.cpu()


def _fits(names: Branches, among: dict[str, Tensor]) -> bool:
    count = len(among["cond"])
    size = count // len(names)
    return count % len(names) == 0 and all(
        bool(among[name][i * size : (i + 1) * size].all()) for i, name in enumerate(names)
    )


@functools.cache
def _returned(function: Any, count: int) -> tuple[str, ...]:
    """Names of what a function returns, as its last ``return`` of so many values has them."""
    for node in reversed(_statements(function, ast.Return)):
        parts = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
        if len(parts) == count:
            return tuple(_name(part.body if isinstance(part, ast.IfExp) else part) for part in parts)
    return ()


def _stated(kind: type) -> Branches | None:
    """The parts into which the call of a pipeline's class takes a prediction, None where it does not say."""
    calls = (inspect.unwrap(vars(owner)["__call__"]) for owner in kind.__mro__ if "__call__" in vars(owner))
    found = next((orders for call in calls if (orders := _orders(call))), frozenset())
    return next(iter(found)) if len(found) == 1 else None


@functools.cache
def _orders(call: Any) -> frozenset[Branches]:
    return frozenset(order for node in _statements(call, ast.Assign) if (order := _parts(node)))


def _parts(node: ast.Assign) -> Branches | None:
    """What ``a, b = x.chunk(2)`` or ``a, b = torch.split(x, len(x) // 2)`` calls the parts of a batch."""
    target, made = node.targets[0], node.value
    if not isinstance(target, ast.Tuple) or not isinstance(made, ast.Call) or not isinstance(made.func, ast.Attribute):
        return None
    along = [k.value for k in made.keywords if k.arg in ("dim", "axis")]
    along += made.args[2 if _name(made.func.value) == "torch" else 1 :]
    of_rows = all(isinstance(x, ast.Constant) and x.value == 0 for x in along)
    called = [_name(x) for x in target.elts]
    if made.func.attr not in ("chunk", "split") or not of_rows or any(x in ("", "_") or "embeds" in x for x in called):
        return None
    names = [_branch(x) for x in called]
    if None in names and names.count(None) == 1 and "uncond" in names and "cond" not in names:
        names[names.index(None)] = "cond"  # noise_uncond, noise_pred = ...
    order = tuple(name for name in names if name is not None)
    return order if len(set(order)) == len(names) and {"cond", "uncond"} <= set(order) else None


def _branch(name: str) -> str | None:
    known = {"perturb": "perturbed", "uncond": "uncond", "neg": "uncond", "text": "cond", "cond": "cond"}
    return next((branch for part, branch in {**known, "image": "image"}.items() if part in name), None)


def _name(node: Any) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _statements(function: Any, kind: type) -> list[Any]:
    """The statements of one kind in a function's source, none where it cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, kind)]


def rows_of(
    pipe: Any, name: str | None, given: dict[str, Any], guided: bool | None, prompts: PromptRows
) -> Branches:  # fmt: skip
    """What the equal groups of rows of a batch are.

    Args:
        pipe: the pipeline, None for a bare denoiser.
        name: of the context the pipeline runs the denoiser in, if it does, or of the guider's batch at hand.
        given: the arguments of the denoiser by name.
        guided: whether the pipeline's call does classifier-free guidance; None outside of a call.
        prompts: embeddings that the pipeline was given or made.
    """
    if name is not None and name != "cond_uncond":
        return (name.removeprefix("pred_"),)
    if given.get("skip_layers") is not None:
        return ("cond_skip",)
    rows = next((len(x) for x in tensors_of(given) if x.ndim > 1), 1)
    if guided is not None and isinstance(pipe, PAGMixin) and pipe.do_perturbed_attention_guidance:
        order: Branches = ("uncond", "cond", "perturbed") if guided else ("cond", "perturbed")
        return order if rows % len(order) == 0 else UNKNOWN
    if guided is False:
        return ("all",)
    fitting = prompts.fitting(given)
    if len(fitting) == 1:
        return next(iter(fitting))
    stated = _stated(type(pipe)) if guided else ("all",)
    if stated is None or rows % len(stated) or (guided and fitting and stated not in fitting):
        return UNKNOWN
    return stated


def of_one_sample(given: dict[str, Any]) -> bool:
    """Whether the halves of a denoiser's batch are the same latents under other conditions, as guidance has them."""
    latents, *conditions = list(tensors_of(given)) or [torch.zeros(1)]
    rows = len(latents) if latents.ndim else 1
    if rows % 2 or not torch.equal(latents[: rows // 2], latents[rows // 2 :]):
        return False
    return any(x.ndim and len(x) == rows and not torch.equal(x[: rows // 2], x[rows // 2 :]) for x in conditions)


def guidance_of(pipe: Any, asked: dict[str, Any], model: Any = None) -> float | None:
    """The scale of classifier-free guidance of a pipeline's call, None where it does without.

    Args:
        pipe: the pipeline, None for a bare denoiser.
        asked: the arguments of its call by name. Some pipelines keep the scale as a property, some in their call only,
            and where a model takes a guidance of its own as an input the true one has another name.
        model: the denoiser at hand; a pipeline's second may have a scale of its own.
    """
    if "true_cfg_scale" in asked:
        scale = asked["true_cfg_scale"]
        return float(scale) if scale and scale > 1 else None
    scale = getattr(pipe, "guidance_scale", None)
    scale = asked.get("guidance_scale") if scale is None else scale
    own = asked.get("guidance_scale_2")
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    guided = scale is not None and scale > 1 if guided is None else guided
    if own is not None and model is not None and model is getattr(pipe, "transformer_2", None):
        scale = own
    return float(scale) if guided and scale is not None else None


def rescales(pipe: Any, asked: dict[str, Any]) -> bool:
    """Whether a pipeline's call brings the guided prediction to the size of the conditional one."""
    if "cfg_normalization" in asked:
        return bool(asked["cfg_normalization"])
    code = getattr(inspect.unwrap(type(pipe).__call__), "__code__", None)
    return bool(asked.get("guidance_rescale")) or "cond_norm" in getattr(code, "co_varnames", ())
