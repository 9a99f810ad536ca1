# SPDX-License-Identifier: Apache-2.0
"""A small causal language model around any token mixer, the same for all of them but for the mixer.

What it shares with :class:`manyheads.models.encoder.Encoder` is :class:`TokenModel`.

Pre-norm blocks as in Llama: ``x + mixer(norm(x))``, then ``x + ffn(norm(x))`` with RMSNorm and SwiGLU, tied embeddings,
no dropout. A mixer that belongs to an architecture with blocks of its own says so by attributes, all optional:
``norm(dim)`` and ``channel_mixer(dim, hidden)`` make other modules, and ``residual = (alpha, beta)`` makes the block
post-norm, ``h = norm(h); h = alpha * h + beta * sublayer(h)`` (MiniMax-01). Mixers with a method ``reduce`` merge
tokens before their layer (:mod:`manyheads.mixers.maelre`); a first one with a method ``prepare`` is given embeddings,
and says what is read and what all layers are given (:mod:`manyheads.mixers.skim_attention`); a first one with a method
``tie`` has the others take weights of its own (:mod:`manyheads.mixers.weight_sharing`). A mixer of either kind may have
a loss of its own, ``auxiliary``, that its last forward in training left.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..attention.masks import each_text, zero_padding
from ..attention.merging import Grouping
from ..call import MixerConfig
from ..errors import UserError
from ..spec import parse
from ..strategy import Mixer, Strategy
from ..training.matching import matched_width, parameters_of

__all__ = ["Decoder", "DecoderConfig", "TokenModel"]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Size of a decoder, or of an encoder.

    Attributes:
        vocab: tokens.
        dim, layers, heads, kv_heads: of the model; ``kv_heads`` None means ``heads``.
        hidden: channels within the feed-forward network; None means ``8 / 3 * dim``.
        length: tokens of the longest training context.
    """

    vocab: int
    dim: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int | None = None
    hidden: int | None = None
    length: int = 256

    @property
    def width(self) -> int:
        """Channels within the feed-forward network."""
        return self.hidden or 8 * round(self.dim / 3)

    def mixer_config(self, layer: int, causal: bool = True) -> MixerConfig:
        if self.dim % self.heads:
            raise UserError(f"{self.dim} channels do not part into {self.heads} heads")
        heads = self.kv_heads or self.heads
        width = self.dim // self.heads
        return MixerConfig(self.dim, self.heads, heads, width, layer, self.layers, self.length, causal)


class SwiGLU(nn.Module):
    """``(silu(x W_g) * x W_u) W_d``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    """One layer: a token mixer and a channel mixer."""

    def __init__(self, mixer: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        norm: Callable[[int], nn.Module] = getattr(mixer, "norm", None) or _rms_norm
        ffn: Callable[[int, int], nn.Module] = getattr(mixer, "channel_mixer", None) or SwiGLU
        self.residual: tuple[float, float] | None = getattr(mixer, "residual", None)
        self.mixer, self.ffn = mixer, ffn(dim, hidden)
        self.mixer_norm, self.ffn_norm = norm(dim), norm(dim)

    def forward(self, x: Tensor, state: Any, **given: Any) -> tuple[Tensor, Any]:
        normed = self.mixer_norm(x)
        mixed, state = self.mixer(normed, state=state, **given)
        if self.residual is None:
            x = x + mixed
            return x + self.ffn(self.ffn_norm(x)), state
        alpha, beta = self.residual
        x = self.ffn_norm(alpha * normed + beta * mixed)
        return alpha * x + beta * self.ffn(x), state


def _rms_norm(dim: int) -> nn.Module:
    return nn.RMSNorm(dim, eps=1e-6)


class TokenModel(nn.Module):
    """Embedding, blocks with the mixer of ``strategy``, and logits over the vocabulary; see :class:`Decoder`.

    Attributes:
        causal: whether a token sees the past only.
    """

    causal: ClassVar[bool] = True
    config_type: ClassVar[type[DecoderConfig]] = DecoderConfig

    def __init__(self, strategy: Strategy | str, config: DecoderConfig) -> None:
        super().__init__()
        mixer = parse(strategy)
        if not isinstance(mixer, Mixer):
            raise UserError(f"{mixer.slug} is no token mixer: it acts on models as they are, by manyheads.use")
        if ("causal" if self.causal else "bidirectional") not in mixer.directions:
            model = "an Encoder" if self.causal else "a Decoder"
            raise UserError(f"{mixer.slug} is {mixer.directions[0]}: it is a layer of {model}")
        self.strategy, self.config = mixer, config
        self.embed = self._stem()
        self.blocks = nn.ModuleList(
            Block(self.strategy.build(config.mixer_config(i, self.causal)), config.dim, config.width)
            for i in range(config.layers)
        )
        mixers: list[Any] = [block.mixer for block in self.blocks]
        if hasattr(mixers[0], "tie"):
            mixers[0].tie(mixers[1:])
        last = self.blocks[-1].mixer
        self.merges = hasattr(last, "reduce")
        self.norm = (getattr(last, "norm", None) or _rms_norm)(config.dim)
        self._start()

    def _stem(self) -> nn.Module:
        """What makes vectors of the input."""
        return nn.Embedding(self.config.vocab, self.config.dim)

    def _start(self) -> None:
        """Normal weights of 0.02, those that write to the residual stream scaled by depth, as in GPT-2.

        In post-norm blocks the residual stream is of size 1, beside which that is nothing: there Xavier's size, times
        ``(8 L)^(-1/4)`` where they write to the stream, as in DeepNorm (arXiv 2203.00555).
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and not hasattr(module, "skip_init")):
                deep = name.endswith(("out_proj", "down"))
                nn.init.normal_(module.weight, std=0.02 / (math.sqrt(2 * self.config.layers) if deep else 1.0))
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        post_norm = [block for block in self.blocks if getattr(block, "residual", None) is not None]
        for block in post_norm:
            for name, module in block.named_modules():
                if isinstance(module, nn.Linear) and not hasattr(module, "skip_init"):
                    deep = name.endswith(("out_proj", "down"))
                    nn.init.xavier_normal_(module.weight, (8 * self.config.layers) ** -0.25 if deep else 1.0)

    @classmethod
    def matched(cls, strategy: Strategy | str, config: DecoderConfig, parameters: int) -> Self:
        """The model whose feed-forward width brings it closest to so many ``parameters``.

        Raises:
            UserError: the mixer alone has more, or the match is off by more than 2 %.
        """
        hidden = matched_width(
            lambda width: cls(strategy, replace(config, hidden=width)), parameters, name=parse(strategy).slug
        )
        return cls(strategy, replace(config, hidden=hidden))

    def auxiliary_loss(self) -> Tensor:
        """What mixers add to the loss in training, as they left it in the last forward: scalar."""
        held = (getattr(block, name, None) for block in self.blocks for name in ("mixer", "ffn"))
        parts = (getattr(mixer, "auxiliary", None) for mixer in held)
        found = [part for part in parts if isinstance(part, Tensor)]
        return torch.stack(found).sum() if found else next(self.parameters()).new_zeros(())

    @property
    def parameters_held(self) -> int:
        """Parameters that a token meets, see :func:`manyheads.training.matching.parameters_of`."""
        return parameters_of(self)

    def forward(
        self, ids: Tensor, *, mask: Tensor | None = None, state: list[Any] | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, list[Any]]:  # fmt: skip
        """Logits ``[B, T, vocab]`` of ``ids [B, T]``, and the states of all layers after them.

        Args:
            ids: tokens.
            mask: ``[B, T]``, True for tokens, False for padding.
            state: what an earlier call of a decoder returned.
            cu_seqlens: ``[N + 1]`` bounds of N sequences packed in one row.
        """
        x, after = self.mixed(zero_padding(self.embed(ids), mask), mask=mask, state=state, cu_seqlens=cu_seqlens)
        return self.norm(x) @ cast(nn.Embedding, self.embed).weight.T, after

    def mixed(self, x: Tensor, *, state: list[Any] | None = None, **given: Any) -> tuple[Tensor, list[Any]]:
        """All blocks over ``x [B, T, dim]``, and their states; ``given`` as for :meth:`forward`."""
        if self.merges:
            if state is not None:
                raise UserError(f"{self.strategy.slug} sees whole texts at once: there is no state")
            return each_text(self._restored, x, given.get("mask"), given.get("cu_seqlens")), [None] * len(self.blocks)
        layout = given.pop("layout", None)
        if hasattr(self.blocks[0].mixer, "prepare"):
            first: Any = self.blocks[0].mixer
            x, shared = first.prepare(x, layout=layout, **given)
            given |= shared
        after = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, None if state is None else state[i], **given)
            after.append(kept)
        return x, after

    def merged(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None, Grouping | None]:
        """All blocks over texts ``x [N, T, dim]`` of ``lengths [N]``, tokens merging between them.

        Returns:
            ``[N, M, dim]``, how many tokens each stands for ``[N, M]`` (None: all as many), and what merged into what.
        """
        whole: Grouping | None = None
        length = x.shape[1]
        mask: Tensor | None = None
        sizes: Tensor | None = None
        if lengths is not None:
            mask = torch.arange(length, device=x.device) < lengths[:, None]
            sizes = mask.to(x.dtype)
        for block in self.blocks:
            mixer: Any = block.mixer
            if (found := mixer.reduce(x, mask, sizes)) is not None:
                each = length // x.shape[1] if sizes is None else 1
                x, sizes, grouping = found
                sizes = None if sizes is None else each * sizes
                mask = None if mask is None or sizes is None else sizes > 0
                whole = grouping if whole is None else whole.then(grouping)
            x, _ = block(x, None, mask=mask, sizes=sizes)
        return x, sizes, whole

    def _restored(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """As :meth:`merged`, every token with what its merged token has become."""
        y, _, grouping = self.merged(x, lengths)
        return y if grouping is None else grouping.restore(y)

    def save(self, folder: Path | str) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"strategy": self.strategy.spec, **asdict(self.config)}, indent=1)
        (place / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, place / "model.safetensors")

    @classmethod
    def load(cls, folder: Path | str, device: str = "cpu") -> Self:
        """What :meth:`save` wrote."""
        place = Path(folder)
        try:
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            model = cls(config.pop("strategy"), cls.config_type(**config))
            model.load_state_dict(load_file(place / "model.safetensors", device=device))
        except FileNotFoundError as error:
            raise UserError(
                f"{folder} holds no {cls.__name__.lower()}: {Path(error.filename or '').name} is missing"
            ) from error
        return model.to(device).eval()


class Decoder(TokenModel):
    """A causal language model of blocks with the mixer of ``strategy``."""

    @torch.no_grad()
    def generate(self, ids: Tensor, count: int) -> Tensor:
        """The likeliest ``count`` tokens after ``ids [B, T]``: ``[B, count]``."""
        logits, state = self(ids)
        made = [logits[:, -1].argmax(-1, keepdim=True)]
        while len(made) < count:
            logits, state = self(made[-1], state=state)
            made.append(logits[:, -1].argmax(-1, keepdim=True))
        return torch.cat(made, 1)[:, :count]
