# SPDX-License-Identifier: Apache-2.0
"""TokenLearner: a few tokens that the model learns to make, each a weighted sum over the patches of an image or frame.

"TokenLearner: What Can 8 Learned Tokens Do for Images and Videos?", Ryoo et al., arXiv 2106.11297. Of the patches
``x [N, C]`` of an image, M maps say where each token looks,

    version 1.1   A = softmax over patches of MLP(LN(x))                 MLP: C -> hidden -> M, GELU between
    version 1     A = sigmoid(conv4(LN(x)))                              3 x 3, no bias, C -> M -> M -> M -> M
    token_i = sum over p of A_ip x_p                                     ``pool=mean`` divides by N

and later blocks work on the M tokens alone. In a video every frame has M tokens of its own, by the same maps, and
later blocks see those of all frames. TokenFuser (``fuse=true``) gives the patches back what a block made of the tokens
y, so that the grid is there again for the next block, which learns tokens anew:

    Y = LN(W LN(y) + b over the M tokens)    B = sigmoid(MLP(LN(x)))    x' = x + B Y              W = 0 at first

Weights are trained together with the model, ``python -m manyheads.recipes.tokenlearner`` trains a small ViT with some:

    with manyheads.use(model, "tokenlearner:weights=FOLDER"): ...

As released (scenic): both versions, a sum in version 1 though the paper's text has a mean, hidden layers of 64, and
learning once in the middle, or with the fuser in every block from there on. Dropout, 0 in released configurations, is
left out. There is no class token there: the mean of the tokens is classified. Here a class token and registers stay
beside the learned tokens. Where a model's output needs every patch again and no fuser is there, which in the paper
never happens, a patch is given the mean of the tokens, weighted by what it gave to each (inferred):
``x'_p = sum over i of A_ip y_i / sum over i of A_ip``. W = 0 makes the model with a fuser what it was without the
block at first, yet not gently: behind one step LN(W ...) is of size 1. Shapes: hidden states ``[B, prefix + F N, C]``.
"""

import functools
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ..calls.trained import load_trained, save_trained
from ..errors import UserError
from ..reducing import Layout, LearnedReducer, Reduction

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LearnedTokens", "TokenLearner"]

_HOW = "python -m manyheads.recipes.tokenlearner --out FOLDER"
_FILES, _EPS = "tokenlearner", 1e-6


@dataclass(frozen=True, kw_only=True)
class TokenLearner(LearnedReducer):
    """Learned tokens.

    Attributes:
        layers: blocks at whose outputs tokens are learned; the middle when not given, with a fuser all from there on.
        tokens: of an image, or of each frame of a video.
        version: of the maps.
        pool: version 1: ``sum`` as released, or ``mean`` as in the paper's text.
        fuse: whether a TokenFuser restores the patches behind every block.
        hidden: units of the hidden layers of version 1.1 and of the fuser.
        weights: folder of trained weights, as :meth:`LearnedTokens.save` wrote it; they say all of the above.
    """

    tokens: int = field(default=8, metadata={"help": "tokens of an image, or of each frame"})
    version: Literal["1.1", "1"] = field(default="1.1", metadata={"help": "1.1: MLP and softmax; 1: convolutions"})
    pool: Literal["sum", "mean"] = field(default="sum", metadata={"help": "of version 1"})
    fuse: bool = field(default=False, metadata={"help": "restore the patches behind every block, by a TokenFuser"})
    hidden: int = field(default=64, metadata={"help": "units of hidden layers"})
    weights: str = field(default="", metadata={"help": f"folder of trained weights; {_HOW} makes one"})

    def __post_init__(self) -> None:
        if self.tokens < 1 or self.hidden < 1:
            raise UserError(f"{self.slug}: tokens and hidden units count, give 1 or more")
        if self.pool == "mean" and self.version != "1":
            raise UserError(f"{self.slug}: pool is of version 1; the weights of 1.1 sum to 1 already")

        default = {f.name: f.default for f in fields(self)}
        if self.weights and any(getattr(self, name) != value for name, value in default.items() if name != "weights"):
            raise UserError(f"{self.slug}: weights were trained for one setting and say which; give weights alone")

    @property
    def proportional(self) -> bool:
        return False

    @functools.cached_property
    def trained(self) -> "LearnedTokens":
        """The weights."""
        if not self.weights:
            raise UserError(f"{self.slug} needs weights=FOLDER, trained together with the model: {_HOW}")
        return LearnedTokens.load(self.weights)

    @property
    def setting(self) -> "TokenLearner":
        """What the weights were trained for."""
        return self.trained.strategy if self.weights else self

    def new_weights(self, dim: int, blocks: int) -> "LearnedTokens":
        return LearnedTokens(self, dim, blocks)

    def having(self, weights: nn.Module) -> "Self":
        made = replace(self)
        made.__dict__["trained"] = weights
        return made

    def reduces_at(self, block: int, blocks: int) -> bool:
        setting, middle = self.setting, max(0, blocks // 2 - 1)
        if block >= blocks - 1:
            return False
        if setting.layers is not None:
            return block in setting.layers
        return block >= middle if setting.fuse else block == middle

    def restores_at(self, block: int, blocks: int) -> bool:
        return self.setting.fuse or super().restores_at(block, blocks)

    def reduce(self, x: Tensor, layout: Layout) -> Reduction:
        height, width = layout.patches(self.spec)
        learn, fuse = self.trained.at(layout.block, x.shape[2])
        prefix, frames = layout.prefix, layout.frames
        patches = _each_frame(x[:, prefix:], frames)
        maps: Tensor = learn(patches, (height // frames, width))

        def merge(y: Tensor) -> Tensor:
            made = maps.to(y.dtype) @ _each_frame(y[:, prefix:], frames)
            return torch.cat([y[:, :prefix], _all_frames(made, frames)], 1)

        def restore(y: Tensor) -> Tensor:
            tokens = _each_frame(y[:, prefix:], frames)
            if fuse is None:
                back = (maps / maps.sum(1, keepdim=True)).mT.to(y.dtype) @ tokens
            else:
                back = fuse(tokens, patches)
            return torch.cat([y[:, :prefix], _all_frames(back, frames)], 1)

        return Reduction(merge, restore)


def _each_frame(x: Tensor, frames: int) -> Tensor:
    """``[B, F n, C] -> [B F, n, C]``."""
    return x.reshape(len(x) * frames, -1, x.shape[2])


def _all_frames(x: Tensor, frames: int) -> Tensor:
    """``[B F, n, C] -> [B, F n, C]``."""
    return x.reshape(len(x) // frames, -1, x.shape[2])


class Maps(nn.Module):
    """The maps ``[B, M, N]`` of patches ``[B, N, C]``, which weigh them in the tokens."""

    def __init__(self, strategy: TokenLearner, dim: int) -> None:
        super().__init__()
        self.norm, count = nn.LayerNorm(dim, eps=_EPS), strategy.tokens
        self.soft, self.mean = strategy.version == "1.1", strategy.pool == "mean"
        if self.soft:
            self.score = _mlp(dim, strategy.hidden, count)
        else:
            layers: list[nn.Module] = []
            for width in (dim, count, count, count):
                layers += [nn.Conv2d(width, count, 3, padding=1, bias=False), nn.GELU()]
            self.score = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.norm(x)
        if self.soft:
            found: Tensor = self.score(x).mT.softmax(2)
            return found
        found = self.score(x.mT.unflatten(2, grid)).flatten(2).sigmoid()
        return found / x.shape[1] if self.mean else found


class Fuser(nn.Module):
    """Patches ``[B, N, C]`` to which is added what became of the tokens ``[B, M, C]``."""

    def __init__(self, strategy: TokenLearner, dim: int) -> None:
        super().__init__()
        self.before, self.behind, self.norm = (nn.LayerNorm(dim, eps=_EPS) for _ in range(3))
        self.mix, self.score = nn.Linear(strategy.tokens, strategy.tokens), _mlp(dim, strategy.hidden, strategy.tokens)
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, tokens: Tensor, x: Tensor) -> Tensor:
        mixed = self.behind(self.mix(self.before(tokens).mT).mT)
        y: Tensor = x + self.score(self.norm(x)).sigmoid() @ mixed
        return y


def _mlp(dim: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))


class LearnedTokens(nn.Module):
    """Maps, and perhaps fusers, of the blocks at whose outputs a strategy learns tokens.

    Raises:
        UserError: there is no such block.
    """

    def __init__(self, strategy: TokenLearner, dim: int, blocks: int) -> None:
        super().__init__()
        self.strategy, self.dim, self.blocks = replace(strategy, weights=""), dim, blocks
        at = [str(block) for block in range(blocks) if strategy.reduces_at(block, blocks)]
        if not at:
            raise UserError(
                f"{strategy.spec}: a block behind which another stands is needed, of the {blocks} there are"
            )
        self.learn = nn.ModuleDict({block: Maps(strategy, dim) for block in at})
        self.fuse = nn.ModuleDict({block: Fuser(strategy, dim) for block in at} if strategy.fuse else {})

    def at(self, block: int, dim: int) -> tuple[nn.Module, nn.Module | None]:
        """What learns tokens of ``dim`` channels behind ``block``, and what fuses them.

        Raises:
            UserError: these weights are of another model, or were trained for other blocks.
        """
        name = str(block)
        if name not in self.learn or dim != self.dim:
            raise UserError(
                f"these weights learn tokens of {self.dim} channels behind blocks {', '.join(self.learn)}, not of "
                f"{dim} behind {name}: give the model that they were trained with, or train others: {_HOW}"
            )
        return self.learn[name], dict(self.fuse.items()).get(name)

    def save(self, folder: str | Path) -> Path:
        """Write ``tokenlearner.safetensors`` and ``tokenlearner.json`` into ``folder``; its path."""
        config = {"strategy": asdict(self.strategy), "dim": self.dim, "blocks": self.blocks}
        return save_trained(folder, _FILES, self.state_dict(), config)

    @staticmethod
    def load(folder: str | Path) -> "LearnedTokens":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the folder does not hold such weights.
        """

        def make(config: dict[str, Any]) -> LearnedTokens:
            said, layers = config["strategy"], config["strategy"].pop("layers")
            strategy = TokenLearner(layers=None if layers is None else tuple(layers), **said)
            return LearnedTokens(strategy, config["dim"], config["blocks"])

        return load_trained(folder, _FILES, make, "learned tokens", _HOW)
