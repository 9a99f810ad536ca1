# SPDX-License-Identifier: Apache-2.0
"""The kind of strategies that change a checkpoint for good, what they see of a model, and the plan that they make.

A plan is a list of steps. As JSON it says what becomes of the structure; the tensors that a step brings along (factors,
dictionaries, weights) go into the new model and are kept with its weights. Numbers of layers, heads, neurons and
channels are those of the model before. Steps are carried out in this order, whatever the order they are given in:
prune, then what changes single layers in the order given, then drop.

Legend: L layers, D width (channels of the residual stream), H query heads and G key/value heads of d channels, I
neurons of a feed-forward part. Weights are ``[out, in]``.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from .errors import UserError
from .strategy import Strategy

if TYPE_CHECKING:
    from torch import Tensor

    from .calls.calibration import Statistic, Statistics

__all__ = [
    "Anatomy", "Assign", "Configure", "Conversion", "Drop", "EncoderConversion", "EncoderDesign", "Factorise",
    "HeadDim", "LayerShape", "Prune", "Recovery", "Replace", "Share", "Step", "Sublayer", "SurgeryPlan",
    "bidirectional", "choose_heads", "largest", "nearest_heads",
]  # fmt: skip

Axis = Literal["width", "heads", "neurons"]
Sublayer = Literal["block", "attention", "mlp"]
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Query heads, key/value heads, channels of a head and neurons of one layer."""

    heads: int
    kv_heads: int
    head_dim: int
    neurons: int


class Anatomy(Protocol):
    """What a conversion sees of a model.

    Attributes:
        width: D.
        layers: their shapes.
        tied: the output layer is the embedding.
        causal: it is a decoder.
        family: name of its axis map, as ``llama`` or ``bert``.
        config: of transformers, to be read only.
    """

    @property
    def family(self) -> str: ...
    @property
    def width(self) -> int: ...
    @property
    def layers(self) -> Sequence[LayerShape]: ...
    @property
    def tied(self) -> bool: ...
    @property
    def causal(self) -> bool: ...
    @property
    def config(self) -> Any: ...

    def has(self, part: str) -> bool:
        """Whether layers have that part: ``q``, ``k``, ``v``, ``o``, ``gate``, ``up``, ``down``."""

    def weight(self, part: str, layer: int | None = None) -> Tensor:
        """The weight ``[out, in]`` of a part of a layer, or of ``embedding`` and ``head``; not to be changed."""

    def bias(self, part: str, layer: int) -> Tensor | None:
        """Its bias ``[out]``, None where it has none."""

    def predicted(self, states: Tensor) -> Tensor:
        """What a decoder would predict if ``states [N, D]`` of the residual stream were the last: logits ``[N, V]``."""

    def parameters(self, plan: SurgeryPlan | None = None) -> int:
        """Parameters of the model after ``plan``, exactly; of the model as it is when None."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Base of the steps of a plan.

    Attributes:
        tensors: what the step brings along, by name; no part of the JSON.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "tensors"}
        return {"step": type(self).__name__.lower(), **own}


@dataclass(frozen=True, kw_only=True)
class Prune(Step):
    """Keep these of an axis, and nothing else of it.

    Attributes:
        axis: ``width``; ``heads`` (query heads: a key/value head goes with the last of its group); ``neurons``.
        keep: ascending. Of every group of heads from which one is kept, as many.
        layer: where; None for all. Width has no layer.
    """

    axis: Axis
    keep: tuple[int, ...]
    layer: int | None = None

    def __post_init__(self) -> None:
        if not self.keep or list(self.keep) != sorted(set(self.keep)) or self.keep[0] < 0:
            raise UserError(f"pruning keeps at least one of the {self.axis}, each once and ascending")
        if self.axis == "width" and self.layer is not None:
            raise UserError("all layers share the width: prune it without a layer")


@dataclass(frozen=True, kw_only=True)
class Drop(Step):
    """Leave out blocks, or the attention or feed-forward part of blocks together with its norms."""

    part: Sublayer
    layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Factorise(Step):
    """A linear layer of rank ``rank``: tensors ``left [out, rank]``, ``right [rank, in]``; the bias stays.

    Attributes:
        reads: layer, factorised before by a step like this, whose ``right`` this one reads with too; it brings none.
    """

    part: str
    layer: int
    rank: int
    reads: int | None = None


@dataclass(frozen=True, kw_only=True)
class HeadDim(Step):
    """Heads of ``dim`` channels in the attention of a layer of an encoder; their logits are then over its root.

    Tensors ``q``, ``k``, ``v`` ``[H * dim, D]`` and ``o [D, H * dim]``; where the layer has biases ``q.bias`` and so
    on. A stock config can say it if all layers have as many.
    """

    layer: int
    dim: int


@dataclass(frozen=True, kw_only=True)
class Share(Step):
    """A linear layer of many blocks as sums of few: ``atoms [S, out, in]``, ``coefficients [len(layers), S]``.

    Biases stay where they are.

    Attributes:
        rank: of what each layer adds of its own, ``left [len(layers), out, rank]`` and ``right [len(layers), rank,
            in]``; nothing when 0.
    """

    part: str
    layers: tuple[int, ...]
    atoms: int
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Replace(Step):
    """Another module in the place of a part, ``attention`` or ``mlp``; ``tensors`` are its state.

    Attributes:
        module: of this package, as ``manyheads.convert._linear:LinearAttention``.
        config: keyword arguments, values of JSON.
    """

    part: str
    layer: int
    module: str
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Assign(Step):
    """Other numbers in a linear layer: ``weight [out, in]`` and, where it has a bias, ``bias [out]``."""

    part: str
    layer: int


@dataclass(frozen=True, kw_only=True)
class Configure(Step):
    """Fields of the model's config, and attributes of that name of its attention modules, such as ``is_causal``."""

    fields: Mapping[str, Any]


_STEPS: dict[str, type[Step]] = {
    cls.__name__.lower(): cls for cls in (Prune, Drop, Factorise, HeadDim, Share, Replace, Assign, Configure)
}


@dataclass(frozen=True)
class SurgeryPlan:
    """What is done to a model; see the head of this file for the order."""

    steps: tuple[Step, ...]

    @property
    def ordered(self) -> tuple[Step, ...]:
        """The steps as they are carried out."""
        return tuple(sorted(self.steps, key=lambda s: 0 if isinstance(s, Prune) else 2 if isinstance(s, Drop) else 1))

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"format": _FORMAT, "steps": [step.plain() for step in self.steps]}

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> SurgeryPlan:
        """Read what :meth:`plain` gave.

        Raises:
            UserError: it is of another version, or damaged.
        """
        try:
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']}")
            steps = []
            for given in data["steps"]:
                own: dict[str, Any] = {
                    k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "step"
                }
                steps.append(_STEPS[given["step"]](**own))
            return cls(tuple(steps))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"this is no plan of surgery of this version ({error}); convert the model again") from error


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """How a converted model is trained afterwards, where the caller gives a budget for it.

    Attributes:
        loss: ``kl`` (of the model's predictions to the teacher's), ``nll`` (of the text), or ``hidden`` (squared
            distance to the teacher's last states, relative to their size; for encoders).
        lr: highest learning rate.
        batch: sequences of a step.
        correct: share of the budget in which the teacher is trained on the text first.
        lora: rank of adapters that are trained in place of all weights, and merged at the end; 0 for all weights.
        trained: which parameters, as a regular expression on their names; all when empty.
    """

    loss: Literal["kl", "nll", "hidden"] = "kl"
    lr: float = 3e-4
    batch: int = 4
    correct: float = 0.0
    lora: int = 0
    trained: str = ""


@dataclass(frozen=True, kw_only=True)
class Conversion(Strategy, ABC):
    """Changes a checkpoint for good: says what it has to know of the model's activations, then what is to be done.

    Attributes:
        families: names of axis maps that it knows what to do with; all when empty.
    """

    families: ClassVar[frozenset[str]] = frozenset()

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        """What calibration gathers, in one pass over the text; nothing by default."""
        del model
        return ()

    @abstractmethod
    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        """What is done.

        Raises:
            UserError: the model does not allow what is asked; the message has the nearest that it does.
        """

    def recovery(self, model: Anatomy) -> Recovery:
        """How the result is trained."""
        return Recovery(loss="kl" if model.causal else "hidden")


@dataclass(frozen=True, kw_only=True)
class EncoderDesign:
    """What makes an encoder of texts of a model, beside the plan for the model itself.

    Attributes:
        pooler: the module of this package that makes one vector of the states of a text, as
            ``manyheads.convert._poolers:Mean``; see there what it is given.
        config: its keyword arguments, values of JSON.
        eos: every text ends with the tokenizer's end of text.
        normalize: vectors are brought to length 1.
        hidden: neurons of a layer between vector and head, where a head is trained; 0 for a linear head.
        dropout: in training, of attention weights, of the output of feed-forward parts, and before the head.
    """

    pooler: str
    config: Mapping[str, Any] = field(default_factory=dict)
    eos: bool = False
    normalize: bool = False
    hidden: int = 0
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class EncoderConversion(Conversion):
    """Makes an encoder of texts of a decoder: a plan, and a design of what reads its states."""

    @abstractmethod
    def design(self, model: Anatomy) -> EncoderDesign:
        """What reads the states.

        Raises:
            UserError: the model is no decoder, or does not allow what is asked.
        """


def bidirectional(model: Anatomy) -> Configure:
    """The step after which every token of a decoder sees all others; the config keeps it where a model is saved.

    Gemma 3 has a flag of its own, under which windows reach as far behind a token as before it. Elsewhere
    ``is_causal`` is what masks are made by.
    """
    own = model.config.model_type == "gemma3_text"
    return Configure(fields={"use_bidirectional_attention": True} if own else {"is_causal": False})


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest n in ``low..high`` that fits, if whatever is smaller than one that fits fits too.

    Raises:
        UserError: not even ``low`` does.
    """
    if not fits(low):
        raise UserError("so few parameters cannot be reached this way: keep more of the model")
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def nearest_heads(heads: int, kv_heads: int, keep: float) -> int:
    """The number of query heads nearest to ``keep`` that leaves equal groups; the larger of two."""
    size = heads // kv_heads
    legal = {groups * each for groups in range(1, kv_heads + 1) for each in range(1, size + 1)}
    return min(legal, key=lambda n: (abs(n - keep), -n))


def choose_heads(scores: Tensor, kv_heads: int, keep: int) -> list[tuple[int, ...]]:
    """Query heads to keep, ``keep`` in each layer, of the highest scores that leave equal groups.

    All layers get the same number of groups of the same size, so that a stock config can say it.

    Args:
        scores: ``[L, H]``; a head is better the higher.
        kv_heads: G; consecutive H / G query heads share one.
        keep: heads of a layer.

    Raises:
        UserError: they cannot be divided; the message has the nearest number that can.
    """
    layers, heads = scores.shape
    size = heads // kv_heads
    near = nearest_heads(heads, kv_heads, keep)
    if keep != near:
        raise UserError(
            f"{keep} of {heads} heads do not divide into equal groups of {kv_heads} key/value heads; keep {near} "
            f"({near / heads:.2f})"
        )
    best: tuple[float, list[tuple[int, ...]]] | None = None
    for groups in range(1, kv_heads + 1):
        if keep % groups or keep // groups > size:
            continue
        top = scores.view(layers, kv_heads, size).topk(keep // groups, -1)
        chosen = top.values.sum(-1).topk(groups, -1)
        total = float(chosen.values.sum())
        if best is None or total > best[0]:
            places = [[(g, top.indices[i, g].tolist()) for g in chosen.indices[i].tolist()] for i in range(layers)]
            found = [tuple(sorted(g * size + h for g, hs in layer for h in hs)) for layer in places]
            best = total, found
    assert best is not None
    return best[1]
