# SPDX-License-Identifier: Apache-2.0
"""The one value that passes through the port: an attention computation of a model, and the place where it happens."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .attention import reference
from .attention.padded import nbytes
from .denoising import Axis, DenoiserCall, DiffusionStep, Layout, ModuleKind, Prompt
from .errors import UserError

__all__ = [
    "AttentionCall",
    "Axis",
    "DenoiserCall",
    "DiffusionStep",
    "Latent",
    "Layout",
    "MixerConfig",
    "ModuleKind",
    "Piece",
    "Prompt",
    "Recurrence",
    "SecondReading",
    "Site",
    "Store",
]

SecondReading = Callable[[Tensor, Callable[[str], list[int]]], Iterator[Tensor]]
Kind = Literal["self", "cross", "joint", "linear"]


@dataclass(frozen=True, slots=True)
class Latent:
    """How a module whose cache holds latents (MLA) makes keys and values of them.

    Attributes:
        rank: channels r of a latent.
        nope_dim, rope_dim, v_dim: channels per head of a key without and with rotary positions, and of a value.
        num_heads: query heads.
        weight: gives the up-projection ``[num_heads * (nope_dim + v_dim), rank]``, per head the key's rows first.
    """

    rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    num_heads: int
    weight: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Site:
    """A place in a model where attention is computed.

    Attributes:
        name: module path, e.g. ``model.layers.3.self_attn``.
        index: order among the attention modules of the model.
        layer: layer index that the model's cache uses, None where the module has none.
        kind: ``self``, ``cross`` or ``joint``; ``linear`` for linear attention with decay, which has no softmax: only
            strategies that ask for it and implement ``attend`` act there.
        causal: True for decoder self-attention, the only kind that a cache strategy can store.
        num_heads: query heads, None where neither the module nor its config says.
        num_kv_heads: key/value heads, likewise.
        window: sliding-window length in tokens, None for full attention.
        peers: layer indices of all causal self-attention of the model, ascending; of all blocks of a denoiser.
        latent: how keys and values come from cached latents, None where the cache holds them themselves.
        kv_sharing: ``store`` where later layers read the keys and values of this one, ``reuse`` where they are those of
            an earlier one: no cache strategy stores anything there. None in most models.
        keys_normed: whether the module brings the keys of every head to one norm, up to learned factors (QK norm).
        output: gives the weight ``[D, H * dv]`` of the linear layer that takes the heads' outputs, None where it is not
            known.
    """

    name: str
    index: int
    layer: int | None
    kind: Kind
    causal: bool
    num_heads: int | None = None
    num_kv_heads: int | None = None
    window: int | None = None
    peers: tuple[int, ...] = ()
    keys_normed: bool = False
    kv_sharing: Literal["store", "reuse"] | None = None
    latent: Latent | None = field(default=None, compare=False, repr=False)
    output: Callable[[], Tensor] | None = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class Recurrence:
    """What a call at a site of kind ``linear`` has beyond q, k and v.

    Attributes:
        decay: log decay per token, ``[H]``.
        state: ``[B, H, K, V]`` sum of ``k v^T`` before the call, None at the start; ``attend`` leaves the next here.
    """

    decay: Tensor
    state: Tensor | None = None


@dataclass(frozen=True, slots=True)
class MixerConfig:
    """What a mixer needs to know of the model it is part of.

    Attributes:
        dim: channels of the residual stream.
        num_heads, num_kv_heads: query heads and key/value heads.
        head_dim: channels of a head.
        layer, num_layers: which layer of how many.
        length: tokens of the longest training context.
        causal: whether a token may see the past only, as in a decoder; in an encoder it sees both sides.
    """

    dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer: int
    num_layers: int
    length: int
    causal: bool = True


@dataclass(slots=True)
class Piece:
    """A forward of a decoder over tokens given and tokens of a strategy's own (``strategy.Interleaved``).

    Attributes:
        embeds: ``[B, T, D]``.
        positions: ``[T]`` of their rotary positions.
        given: how many are the caller's; they come first, and only their outputs are handed on.
        mask: ``[1, 1, T, S]`` that every layer is given, True = attend; None for the model's own.
        moved: other positions, ``[G]``, that the strategy wants the model's rotary tables of; None for none.
        rotary: cosines and sines ``[1, G, rotary_dim]`` of those, from the port; None in a model without.
        cached: whether the cache keeps its keys and values, and what it has kept is seen.
    """

    embeds: Tensor
    positions: Tensor
    given: int
    mask: Tensor | None = None
    moved: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    cached: bool = True


class Store(ABC):
    """What a site remembers between steps: made by ``Strategy.store``, driven by the port.

    One forward of one layer is :meth:`update` (the cache takes the new keys and values), :meth:`mask` (before
    attention), :meth:`evict` (after attention). Where no other strategy acts at the site, the port asks :meth:`attend`
    after ``update``, and calls ``mask`` and the model's own attention only if the answer is None.

    Attributes:
        covers_past: :meth:`mask` knows what is visible of the past: the model's mask may be that of the new tokens.
        computes: its use is that :meth:`attend` answers instead of the model's own function.
        appends: keys stay as they came and where they are.
        group: the stores of one cache by layer, which share this dict.
        record: last queries to keep for :meth:`fork`; 0 for a store that is never forked.
        room: tokens that can be decoded without the host, 0 without a fixed size; set by :meth:`reserve`.
        prefilling: more tokens of the prompt are to come, many at a time.
        prompt: tokens of a prompt that comes in chunks, 0 where it comes at once.
    """

    covers_past: ClassVar[bool] = False
    computes: ClassVar[bool] = False
    appends: bool = False

    def __init__(self, site: Site, record: int = 0) -> None:
        self.site = site
        self.group: dict[int, Store] = {}
        self.record, self.room, self.prefilling, self.prompt = record, 0, False, 0

    @property
    @abstractmethod
    def seen(self) -> int | Tensor:
        """Tokens so far, dropped ones included; a tensor of no dimension where only the device counts."""

    @property
    @abstractmethod
    def rows(self) -> int | None:
        """Batch rows held, None before the first token."""

    @property
    def real(self) -> Tensor | None:
        """Columns that hold tokens and not padding, as their own forward said: bool ``[B, seen]``; None for all."""
        return None

    @property
    @abstractmethod
    def keys(self) -> Tensor | None:
        """Keys held, None before the first token."""

    @property
    @abstractmethod
    def values(self) -> Tensor | None:
        """Values held, None before the first token."""

    @property
    def places(self) -> Tensor | None:
        """The column of what each slot holds ``[B, Hs, S]``; None where they stand in place. Raises if unknown."""
        raise UserError(f"the cache of {self.site.name} does not say where its keys stand: look with full, or without")

    @property
    def fixed(self) -> bool:
        """Whether decoding can be compiled."""
        return self.room > 0

    @property
    def why_not_fixed(self) -> str | None:
        """Why the storage cannot have a fixed size and what to do instead; None where it can."""
        return f"the cache of {self.site.name} grows as it decodes, which cannot be compiled; leave room away"

    def reserve(self, room: int) -> None:
        """Give the empty storage a fixed size: ``room`` tokens after a prompt. Raises UserError where it cannot."""
        if (reason := self.why_not_fixed) is not None:
            raise UserError(reason)
        self.room = room
        self.reset()

    @abstractmethod
    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the keys and values of the next T tokens; return what attention is to use."""

    def attend(self, call: "AttentionCall") -> Tensor | None:
        """Attention over a storage of its own ``[B, T, H, dv]``; None where keys and values are needed."""
        return None

    @abstractmethod
    def mask(self, call: "AttentionCall") -> "AttentionCall":
        """Give the call the mask of what is held."""

    @abstractmethod
    def evict(self, call: "AttentionCall") -> None:
        """Observe the attention call, and drop what the strategy drops now."""

    def fork(self, target: "Store | None" = None) -> "Store":
        """``target``, empty or by default a new store of this strategy, as the same forwards would have made it.

        It shares tensors with this store. Raises UserError where that is impossible.
        """
        raise UserError(f"the cache of {self.site.name} cannot be forked to another strategy: read the prompt for each")

    @property
    def second_reading(self) -> "SecondReading | None":
        """Given where the prompt, which has just been read, must be read again before anything is dropped.

        It takes the prompt ``[B, L]`` and a function that gives the tokens of a text (UserError where the model has no
        tokenizer), and yields tokens ``[B, T]`` to be read in turn; then all layers of the cache drop what they drop.
        """
        return None

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Take batch rows ``[B']`` of everything remembered."""

    @abstractmethod
    def crop(self, count: int) -> None:
        """Forget the last ``count`` tokens. Raises UserError where what was before is gone."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @property
    @abstractmethod
    def held(self) -> list[Tensor | None]:
        """Every tensor kept between steps."""

    @property
    def offloaded(self) -> list[Tensor | None]:
        """Every tensor kept in host memory while the model is elsewhere; without a GPU, that would be."""
        return []

    def nbytes(self) -> int:
        """Bytes really held: storages of keys, values and bookkeeping, room for growth included; not the offloaded."""
        return nbytes(*self.held)

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that is remembered, as tensors and plain values by name; what only :meth:`fork` needs is left out."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what :meth:`state_dict` of a store of the same strategy and site gave."""


@dataclass(slots=True)
class AttentionCall:
    """One attention computation, after norms and rotary positions. Edit it with :meth:`replace`.

    Attributes:
        site: where it happens.
        q: queries ``[B, H, T, d]``.
        k: keys ``[B, Hkv, S, d]``; with a cache, the keys of all slots.
        v: values ``[B, Hkv, S, dv]``.
        scale: factor on ``q k^T``.
        mask: boolean, broadcastable to ``[B, H, T, S]``, True = attend; None = no restriction beyond ``is_causal``.
        bias: additive logits, broadcastable to ``[B, H, T, S]`` (T5's position bias, a user's float mask).
        is_causal: the causal mask, anchored at the bottom right, applies on top of ``mask``.
        softcap: tanh cap on the logits (Gemma 2).
        sinks: ``[H]`` learned sink logits (gpt-oss).
        dropout: probability on the weights, 0 outside training.
        training: whether the module is in training mode.
        hidden: ``[B, T, D]`` that the attention module was given, after its norm; None where it is not known.
        positions: ``[B, T]`` rotary position ids where the model passes them on.
        rotary: cosines and sines ``[B, T, rotary_dim]`` of those positions, where the model passes them on.
        step: tokens that the sequence of the queries had before this call, a tensor in compiled decoding; 0 without a
            cache. Keys end where queries do, whatever the cache holds or has allocated ahead.
        past: the model's cache that counts them, None without one; not to be kept.
        cache: the site's store, if a strategy made one.
        recurrence: decay and state at a site of kind ``linear``, None elsewhere.
        prepended: keys in front of all others that stand for no token (``calls.edits.append_kv``).
        diffusion: step, branches and token layout of a denoiser, None elsewhere.
        function: name of the attention function of the user's own that the model computes with; None for softmax
            attention as this call says it.
        state: scratch of the strategy at hand at this site, kept while its ``use`` is open; in a denoiser that runs
            its branches one after the other, a scratch for each.
    """

    site: Site
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None = None
    bias: Tensor | None = None
    is_causal: bool = False
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0
    training: bool = False
    hidden: Tensor | None = None
    positions: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    step: int | Tensor = 0
    cache: Store | None = None
    past: Any = None
    recurrence: Recurrence | None = None
    prepended: int = 0
    diffusion: DiffusionStep | None = None
    function: str | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def replace(self, **changes: Any) -> "AttentionCall":
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)

    def allowed(self) -> Tensor | None:
        """``mask`` and ``is_causal`` as one boolean mask, None when everything may be attended to."""
        if not self.is_causal:
            return self.mask
        causal = reference.causal_mask(self.q.shape[2], self.k.shape[2], self.q.device)[None, None]
        return causal if self.mask is None else self.mask & causal

    def require_softmax(self) -> None:
        """Raise UserError where the model computes with an attention function of the user's own."""
        if self.function is not None:
            raise UserError(
                f"{self.site.name} computes with {self.function!r}, a function of your own, its weights are not known; "
                'load the model with attn_implementation="sdpa" or "eager"'
            )

    def attend(self) -> Tensor:
        """Dense reference attention in the dtype of the inputs, ``[B, T, H, dv]``, without dropout."""
        self.require_softmax()
        return reference.attention(
            self.q, self.k, self.v, scale=self.scale, mask=self.allowed(), bias=self.bias, softcap=self.softcap,
            sinks=self.sinks,
        )  # fmt: skip

    def lse(self, block: int = 512) -> Tensor:
        """Row log-sum-exp ``[B, H, T]`` in float32, computed ``block`` queries at a time on demand.

        With it any single weight is ``exp(scale * q_t . k_s + bias - lse_t)``, without a ``T x S`` map.
        """
        self.require_softmax()
        allowed = self.allowed()
        rows = []
        for t in range(0, self.q.shape[2], block):
            cut = slice(t, t + block)

            def rows_of(x: Tensor | None, cut: slice = cut) -> Tensor | None:
                return x if x is None or x.shape[-2] == 1 else x[..., cut, :]

            x = reference.logits(
                self.q[:, :, cut].float(), self.k.float(), scale=self.scale, bias=rows_of(self.bias),
                softcap=self.softcap,
            )  # fmt: skip
            rows.append(reference.logsumexp(x, rows_of(allowed), self.sinks))
        return torch.cat(rows, -1)
