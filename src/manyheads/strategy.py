# SPDX-License-Identifier: Apache-2.0
"""What a strategy is, and the one-line text that names it: ``slug:field=value,field=value``."""

import dataclasses
import difflib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from .errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from .call import AttentionCall, Denoising, Diffusion, MixerConfig, Site, Store

__all__ = [
    "Attention",
    "AttentionCompute",
    "AttentionEdit",
    "AttentionPatch",
    "AttentionWatch",
    "Cache",
    "Denoiser",
    "DenoiserModule",
    "DenoiserPrediction",
    "Layers",
    "Mixer",
    "Residual",
    "Strategy",
    "parse",
    "split_outside",
]


def _as_layers(value: object) -> object:
    """``"0-3+7"`` -> ``(0, 1, 2, 3, 7)``: commas already part the fields of a spec."""
    if not isinstance(value, str):
        return value
    layers: list[int] = []
    for part in value.split("+"):
        first, _, last = part.partition("-")
        layers.extend(range(int(first), int(last or first) + 1))
    return tuple(layers)


Layers = Annotated[tuple[int, ...] | None, BeforeValidator(_as_layers)]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """Base of every strategy: a frozen dataclass whose fields are the paper's hyperparameters.

    What a strategy can do is said by the kinds below that it inherits, several where it does several things; code asks
    ``isinstance``. Kinds stand last among the bases of a class.

    Attributes:
        layers: layers to act on, None for all. In a spec: ``layers=0-3+7``.
    """

    slug: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset({"self", "cross", "joint"})

    layers: Layers = field(default=None, metadata={"help": "layers to act on, as 0-3+7; all when not given"})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.slug = cls.__module__.rpartition(".")[2]

    def selects(self, site: "Site") -> bool:
        """Whether this strategy acts at ``site``."""
        return site.kind in self.kinds and (self.layers is None or site.layer in self.layers)

    @property
    def spec(self) -> str:
        """The text that :func:`parse` reads back into this strategy.

        Fields at their defaults are left out, and those that do not count when strategies are compared.
        """
        changed = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.compare and value != f.default:
                text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
                changed.append(f"{f.name}={text}")
        return self.slug + (":" + ",".join(changed) if changed else "")


class Attention(Strategy, ABC):
    """Acts on the attention of a model, through the port: one or more of the four kinds that follow.

    They are four because the port installs only what a strategy uses. Shapes are those of ``AttentionCall``.
    """


class AttentionEdit(Attention):
    """Changes what attention is given."""

    @abstractmethod
    def edit(self, call: "AttentionCall") -> "AttentionCall":
        """Transform q, k, v, bias or mask before attention."""


class AttentionCompute(Attention):
    """Computes attention another way. At most one such strategy per site."""

    @abstractmethod
    def attend(self, call: "AttentionCall") -> "Tensor":
        """Return the output ``[B, T, H, dv]``."""


class AttentionWatch(Attention):
    """Reads attention and changes nothing."""

    @abstractmethod
    def watch(self, call: "AttentionCall", out: "Tensor") -> None:
        """Read ``call`` and ``out [B, T, H, dv]``; change neither. Keep results in ``call.memory``."""


class AttentionPatch(Attention):
    """Changes what attention gives."""

    @abstractmethod
    def patch(self, call: "AttentionCall", out: "Tensor") -> "Tensor":
        """Change the per-head outputs ``[B, T, H, dv]``."""


class Cache(Strategy, ABC):
    """Says what a site remembers between steps. At most one such strategy per site.

    Attributes:
        has_budget: ``budget`` means something.
        dense_prefill: the first forward attends to everything, so that one prefill can serve many strategies.
        exact_chunks: if evicting at every step: many tokens at once give what one by one does.
        needs_queries: gathers statistics of the queries of every forward.
        cross_layer: decides for all layers together, when all have run.
        accumulated_attention: needs the attention that each slot received since it came.
    """

    has_budget: ClassVar[bool] = False
    dense_prefill: ClassVar[bool] = False
    exact_chunks: ClassVar[bool] = False
    needs_queries: ClassVar[bool] = False
    cross_layer: ClassVar[bool] = False
    accumulated_attention: ClassVar[bool] = False

    @property
    def budget(self) -> int | float:
        """Slots per head, or the fraction in (0, 1] of the tokens seen that is kept; 1.0 keeps all."""
        return 1.0

    @property
    def schedule(self) -> str | int:
        """When tokens are evicted: ``prefill``, ``chunk``, ``step``, or every so many tokens."""
        return "prefill"

    @property
    def record(self) -> int:
        """How many of the last queries of a shared prefill the strategy needs."""
        return 0

    def check(self, slots: int) -> None:
        """Raise UserError when ``slots`` per head are too few for this strategy; any number is enough by default."""
        del slots

    @abstractmethod
    def store(self, site: "Site") -> "Store":
        """What ``site`` remembers."""


class Residual(Strategy, ABC):
    """Acts on the residual stream."""

    @abstractmethod
    def residual(self, site: "Site", hidden: "Tensor", memory: dict[str, Any]) -> "Tensor":
        """Read or change the output ``hidden [B, T, D]`` of the block that ``site`` is in; ``memory`` as in a call.

        A block with several sites asks once, after the last of them, for the first that is selected.
        """


class Denoiser(Strategy, ABC):
    """Acts on a denoiser beyond its attention calls: one or both of the two kinds that follow."""


class DenoiserModule(Denoiser):
    """Acts around the attention modules of a denoiser."""

    @abstractmethod
    def around_module(
        self, site: "Site", now: "Diffusion", memory: dict[str, Any], compute: "Callable[[], Any]"
    ) -> Any:
        """What a denoiser's attention module returns: ``compute()``, or what it returned at an earlier step."""


class DenoiserPrediction(Denoiser):
    """Makes the prediction of a denoiser (guidance)."""

    @abstractmethod
    def denoise(self, call: "Denoising") -> "Tensor":
        """Make a denoiser's prediction of one or more calls of it."""


class Mixer(Strategy, ABC):
    """Is a layer of a model that is trained from scratch."""

    @abstractmethod
    def build(self, config: "MixerConfig") -> "torch.nn.Module":
        """The token mixer of one layer, see :mod:`manyheads.mixers._mixer`."""


def split_outside(text: str) -> list[str]:
    """Pieces of ``text`` between commas that stand outside parentheses, stripped, empty ones left out.

    Raises:
        UserError: parentheses that do not match.
    """
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth:
        raise UserError(f"{text!r}: parentheses do not match")
    return [piece.strip() for piece in pieces if piece.strip()]


def parse(spec: "str | Strategy") -> Strategy:
    """Build a strategy from ``slug:field=value,field=value``; a strategy is returned as it is.

    ``slug(field=value,field=value)`` means the same, so that a spec can be the value of a field:
    ``graphkv:base=snapkv(window_size=16),budget=0.25``. The slug ``auto`` stands for the
    cache strategy that we recommend.

    Raises:
        UserError: unknown slug or field (with the nearest names), or a value that the field refuses.
    """
    if isinstance(spec, Strategy):
        return spec
    from . import catalog

    match = re.fullmatch(r"\s*([^:(]*)(?:\((.*)\)|:(.*))?\s*", spec, re.DOTALL)
    if match is None:
        raise UserError(f"{spec!r} is no spec: write slug:field=value,field=value")
    slug, rest = match[1].strip(), match[2] or match[3] or ""
    slug = catalog.RECOMMENDED if slug == "auto" else slug
    cls = catalog.load(slug)
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for item in split_outside(rest):
        name, equals, text = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"{spec!r}: write {item!r} as field=value")
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{slug} has no field {name!r}; {hint}it has {', '.join(sorted(fields))}")
        if name in values:
            raise UserError(f"{spec!r}: {name!r} is given twice")
        try:
            values[name] = TypeAdapter(hints[name]).validate_python(text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"{slug}: {name}={text}: {reason}") from None
        except ValueError as error:
            raise UserError(f"{slug}: {name}={text}: {error}") from None
    return cls(**values)
