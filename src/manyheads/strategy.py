# SPDX-License-Identifier: Apache-2.0
"""What a strategy is, and the kinds that say what it can do."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from .errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

    import torch
    from torch import Tensor

    from .attention.image_layout import ImageLayout
    from .call import AttentionCall, DenoiserCall, DiffusionStep, MixerConfig, Piece, Site, Store

__all__ = [
    "Attention", "AttentionCompute", "AttentionEdit", "AttentionPatch", "AttentionWatch", "BlockParts", "Cache",
    "Denoiser", "DenoiserModule", "DenoiserPrediction", "ImagePositions", "Interleaved", "Layers", "LinearCompute",
    "MidBlock", "Mixer", "Ranker", "RankerConfig", "Residual", "Strategy", "protected",
]  # fmt: skip

Layers = tuple[int, ...] | None  # in a spec: 0-3+7


def _slug(module: str) -> str:
    """What names the strategy of a module: ``slug`` of a paper's file or ``slug.part`` of its folder.

    Folders of papers are ``manyheads.<category>`` or ``manyheads.domains.<field>``; elsewhere the module names itself.
    """
    package, *path = module.split(".")
    paper = path[2 if path[:1] == ["domains"] else 1 :]
    if package != __package__ or len(paper) != 2 or paper[0] == paper[1]:
        return module.rpartition(".")[2]
    return ".".join(paper)


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
        cls.slug = _slug(cls.__module__)

    def selects(self, site: "Site") -> bool:
        """Whether this strategy acts at ``site``."""
        return site.kind in self.kinds and (self.layers is None or site.layer in self.layers)

    @property
    def spec(self) -> str:
        """The text that :func:`manyheads.parse` reads back into this strategy.

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
    def attend(self, call: "AttentionCall") -> "Tensor | None":
        """Return the output ``[B, T, H, dv]``; None leaves this call to the model, as it stands."""


class AttentionWatch(Attention):
    """Reads attention and changes nothing."""

    @abstractmethod
    def watch(self, call: "AttentionCall", out: "Tensor") -> None:
        """Read ``call`` and ``out [B, T, H, dv]``; change neither. Keep results in ``call.state``."""

    def follow(self, state: dict[str, Any], past: Any, qkv: Any, rest: Any, out: "Tensor") -> bool:
        """Take a token that follows those seen, without mask or bias; False where :meth:`watch` is to have its call."""
        return False

    def entering(self, state: dict[str, Any], past: Any) -> None:
        """The module is about to run with the cache ``past``; what is kept of that cache's tensors should go."""

    def settle(self, site: "Site", state: dict[str, Any]) -> None:
        """No further call is at hand: finish what was put off. The results are asked for, or ``generate`` has ended."""


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
        rereads: has the model read the prompt again before anything is dropped.
        accumulated_attention: needs the attention that each slot received since it came.
    """

    has_budget: ClassVar[bool] = False
    dense_prefill: ClassVar[bool] = False
    exact_chunks: ClassVar[bool] = False
    needs_queries: ClassVar[bool] = False
    cross_layer: ClassVar[bool] = False
    rereads: ClassVar[bool] = False
    accumulated_attention: ClassVar[bool] = False

    @property
    def budget(self) -> int | float:
        """Slots per head, or the fraction in (0, 1] of the tokens seen that is kept; 1.0 keeps all."""
        return 1.0

    @property
    def schedule(self) -> str | int:
        """When tokens are evicted: ``prefill``, ``turn``, ``chunk``, ``step``, or every so many tokens."""
        return "prefill"

    def for_turns(self) -> "Cache":
        """The strategy for a chat: one that would compress the first prompt alone ranks anew at every later one.

        A schedule of its own stays, and so does what never evicts.
        """
        fields = {f.name for f in dataclasses.fields(self)}
        if self.has_budget and "schedule" in fields and self.schedule == "prefill":
            return dataclasses.replace(self, schedule="turn")  # type: ignore[call-arg]
        return self

    @property
    def kept_whole(self) -> int:
        """Up to how many tokens a text is kept whole and in the model's dtype, whatever fraction may stay."""
        return 0

    @property
    def record(self) -> int:
        """How many of the last queries of a shared prefill the strategy needs."""
        return 0

    @property
    def lossless(self) -> bool:
        """Whether a budget of 1.0 keeps every key and value as it is."""
        return True

    def protecting(self, protect: object) -> "Self":
        """The strategy with spans of tokens that it may not drop, see :mod:`manyheads.attention.protect`.

        Raises:
            UserError: it does not keep tokens one by one, or these are no spans.
        """
        raise UserError(
            f"{self.slug} keeps its tokens in a storage of its own, where protect= is not known: use a strategy that "
            "keeps slots, as snapkv, hedge or full"
        )

    def with_system(self, span: tuple[int, int] | None) -> "Cache":
        """The strategy with ``protect=system`` made the tokens of the system message, None where there is none.

        Raises:
            UserError: it protects the system message, and there is none.
        """
        if not self.protects_system:
            return self
        if span is None:
            raise UserError(f"{self.spec}: there is no system message here; write the tokens, as protect=0-39")
        return self.protecting([span])

    @property
    def protects_system(self) -> bool:
        """Whether it has yet to be told where the system message is."""
        return False

    def check(self, slots: int) -> None:
        """Raise UserError when ``slots`` per head are too few for this strategy; any number is enough by default."""
        del slots

    @abstractmethod
    def store(self, site: "Site") -> "Store":
        """What ``site`` remembers."""


def protected(strategies: "Sequence[Strategy]", protect: object) -> "tuple[Strategy, ...]":
    """The same strategies, of which the one that keeps the cache may not drop the spans ``protect``.

    Raises:
        UserError: none keeps a cache, or it cannot hold to that.
    """
    if not any(isinstance(strategy, Cache) for strategy in strategies):
        raise UserError("protect= names tokens that no cache strategy may drop, and none is given: add one, as snapkv")
    return tuple(s.protecting(protect) if isinstance(s, Cache) else s for s in strategies)


class Residual(Strategy, ABC):
    """Acts on the residual stream."""

    @property
    def reads_residual(self) -> bool:
        """Whether it does so as it is set."""
        return True

    @abstractmethod
    def residual(self, site: "Site", hidden: "Tensor", state: dict[str, Any]) -> "Tensor":
        """Read or change the output ``hidden [B, T, D]`` of the block that ``site`` is in; ``state`` as in a call.

        A block with several sites asks once, after the last of them, for the first that is selected.
        """


class BlockParts(Residual):
    """Also reads what the modules of a block gave, to tell which of them wrote an entry of the residual stream."""

    @property
    def reads_parts(self) -> bool:
        """Whether it does so as it is set; what it reads is then held until the block has run."""
        return True

    @abstractmethod
    def parts(
        self, site: "Site", before: "Tensor", parts: "dict[str, Tensor]", hidden: "Tensor", state: dict[str, Any]
    ) -> None:
        """Read the block's input ``before``, its output ``hidden``, and outputs of its children by path, ``[B, T, D]``.

        Called before :meth:`residual`; change none of them.
        """


class MidBlock(Strategy, ABC):
    """Adds to the residual stream within a block, between its attention and its feed-forward part."""

    @abstractmethod
    def added(self, site: "Site", hidden: "Tensor", state: dict[str, Any]) -> "Tensor":
        """What is added ``[B, T, D]`` to the stream ``hidden [B, T, D]``; after the hooks of the attention itself."""


class LinearCompute(Strategy, ABC):
    """Computes the linear layers of a model's blocks another way. At most one such strategy per layer.

    ``layers`` counts blocks, as it does attention. Embeddings and the output head stand in no block.
    """

    def selects_linear(self, name: str, layer: int | None) -> bool:
        """Whether this strategy computes the linear layer at the module path ``name``, in the block of ``layer``."""
        del name
        return self.layers is None or layer in self.layers

    @abstractmethod
    def linear(self, weight: "Tensor", bias: "Tensor | None", name: str) -> "Callable[[Tensor], Tensor]":
        """What computes ``x W^T + b`` for ``x [..., K]``; made once when the port opens.

        Args:
            weight: ``[N, K]``, not to be changed.
            bias: ``[N]`` or None.
            name: module path of the layer.
        """


class Interleaved(Strategy, ABC):
    """Has a decoder read tokens of its own among those that it is given, in one forward or piece by piece.

    Whoever calls the model sees none of them: it gives outputs for the tokens that it was given, and its cache counts
    those alone. At most one such strategy per model.
    """

    @abstractmethod
    def pieces(self, embeds: "Tensor", seen: int, cached: bool) -> "Iterator[Piece] | None":
        """What is read in turn, each piece when the one before has been; None to read the tokens as they are.

        Args:
            embeds: embeddings of the tokens given, ``[B, T, D]``.
            seen: tokens that the cache has seen before.
            cached: whether there is a cache, without which pieces know nothing of each other.
        """


class ImagePositions(Strategy, ABC):
    """Says, for all layers, at which positions tokens of images stand and which tokens see each other; one a model."""

    one_axis: ClassVar[bool] = False  # it means positions of plain RoPE, and nothing on the axes of M-RoPE

    @abstractmethod
    def position_ids(self, layout: "ImageLayout") -> "Tensor":
        """Positions ``[B, S]`` of all columns, integers or not; those of a column depend on none after its image."""

    @abstractmethod
    def allowed(self, layout: "ImageLayout", queries: int) -> "Tensor":
        """Which of all S columns the last ``queries`` see, bool ``[B, queries, S]``; every query sees itself."""


class Denoiser(Strategy, ABC):
    """Acts on a denoiser beyond its attention calls: one or both of the two kinds that follow."""


class DenoiserModule(Denoiser):
    """Acts around the attention modules of a denoiser."""

    @abstractmethod
    def around_module(
        self, site: "Site", step: "DiffusionStep", state: dict[str, Any], compute: "Callable[[], Any]"
    ) -> Any:
        """What a denoiser's attention module returns: ``compute()``, or what it returned at an earlier step."""


class DenoiserPrediction(Denoiser):
    """Makes the prediction of a denoiser (guidance)."""

    @abstractmethod
    def denoise(self, call: "DenoiserCall") -> "Tensor":
        """Make a denoiser's prediction of one or more calls of it."""


class Mixer(Strategy, ABC):
    """Is a layer of a model that is trained from scratch.

    Attributes:
        directions: ``causal`` where it can be a layer of a decoder, ``bidirectional`` where of an encoder.
    """

    directions: ClassVar[tuple[Literal["causal", "bidirectional"], ...]] = ("causal",)

    @abstractmethod
    def build(self, config: "MixerConfig") -> "torch.nn.Module":
        """The token mixer of one layer, see :mod:`manyheads.mixers._mixer`."""


@dataclass(frozen=True, slots=True)
class RankerConfig:
    """Size of a model that ranks documents.

    Attributes:
        dim: channels of a word's vector.
        heads, layers, hidden: of the transformer that gives words their context.
        query: words of a query at most.
    """

    dim: int = 300
    heads: int = 10
    layers: int = 2
    hidden: int = 100
    query: int = 30


class Ranker(Strategy, ABC):
    """Scores documents for queries by their words' vectors, in a model that is trained from scratch.

    Attributes:
        terms: words of a document that are read at most.
    """

    terms: int

    @abstractmethod
    def ranker(self, config: RankerConfig) -> "torch.nn.Module":
        """What scores, given vectors ``[B, T, dim]`` of words and which of them are real ``[B, T]``.

        It has ``query(x, real)`` and ``document(x, real)``, which give vectors of words in their context, and
        ``score(query, query_real, document, document_real)`` of these, ``[B]``. What is not real changes nothing.
        """
