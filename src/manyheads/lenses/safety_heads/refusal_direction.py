# SPDX-License-Identifier: Apache-2.0
"""Directions of the residual stream: how two sets of prompts differ, chosen by what erasing and adding them does.

Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction" (arXiv 2406.11717); the paper of
``safety_heads`` takes over their rule. A candidate for every block l and token position p is the difference of two
means in float64,

    r[l, p] = mean over the first set of x[l, p]  -  mean over the second set of x[l, p],

x the residual stream that enters block l. With the log odds ``log P(answers) - log(1 - P(answers))`` of the tokens that
the first set is answered with, a candidate falls out if it is of the last fifth of the blocks, if erasing it changes
what the second set is answered by more than 0.1 nats (KL), or if adding it to the second set leaves the log odds below
0; of the rest the one that lowers the log odds of the first set most when it is erased is taken.

Erasing here acts where blocks meet, before the first and after each of them: what an attention layer writes along the
direction is still seen by the feed-forward layer of the same block, which the paper's code, knowing the insides of each
architecture, prevents. Legend: N prompts, T tokens, D width, L blocks, P positions.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...errors import UserError
from ...lens import device_of

__all__ = ["Direction", "Prompts", "difference_of_means", "erased", "find_direction", "log_odds", "steered"]

Prompts = Sequence[Tensor] | Tensor  # token ids [T] each, of any lengths
_FIRST = 0.8  # part of the blocks that candidates are taken from
_BATCH = 64


@dataclass(frozen=True)
class Direction:
    """A direction of the residual stream.

    Attributes:
        vector: ``[D]`` float32, as long as it was found.
        layer: the block that the residual stream enters.
        position: of the token, counted from the end of the prompt: -1 is the last.
        about: what it was chosen by, as text.
    """

    vector: Tensor
    layer: int = 0
    position: int = -1
    about: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, which the strategy ``safety_heads`` takes as its ``direction``."""
        about = {**self.about, "layer": str(self.layer), "position": str(self.position)}
        save_file({"direction": self.vector.detach().float().cpu().contiguous()}, str(path), metadata=about)
        return Path(path)

    @staticmethod
    def load(path: str | Path) -> "Direction":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: there is no such file, or it holds no direction.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about, vector = dict(file.metadata() or {}), file.get_tensor("direction")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} holds no direction ({error}); write one with find_direction(...).save") from None
        if vector.ndim != 1 or not vector.isfinite().all() or not vector.any():
            raise UserError(f"{path}: a direction is one vector [D] of finite numbers that are not all 0")
        return Direction(vector, int(about.pop("layer", 0)), int(about.pop("position", -1)), about)


@torch.no_grad()
def difference_of_means(
    model: nn.Module, first: Prompts, second: Prompts, positions: Sequence[int] = (-1,)
) -> Tensor:  # fmt: skip
    """``r[l, p]`` of every block and position: float64 ``[L, P, D]`` on the CPU.

    Args:
        model: a transformers model.
        first, second: prompts; each at least as long as the positions reach.
        positions: counted from the end, all below 0.
    """

    def mean(prompts: Prompts) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for ids in _batches(model, prompts):
            entering = model(input_ids=ids, output_hidden_states=True).hidden_states[:-1]
            total = total + torch.stack([x[:, list(positions)].double().sum(0).cpu() for x in entering])
        return total / len(prompts)

    return mean(first) - mean(second)


def find_direction(
    model: nn.Module, first: Prompts, second: Prompts, *, answers: Sequence[int], check: tuple[Prompts, Prompts],
    positions: Sequence[int] = (-1,), max_kl: float = 0.1, min_steering: float = 0.0,
    blocks: Sequence[int] | None = None,
) -> Direction:  # fmt: skip
    """The direction that parts ``first`` from ``second`` and that the answer hangs on.

    Args:
        model: a transformers model, in evaluation mode.
        first, second: prompts, as token ids; the paper takes 128 of each. For refusal: harmful and harmless.
        answers: the tokens with which answers to the first set begin.
        check: other prompts of both sets to choose by; the paper takes 32 of each.
        positions: candidates, counted from the end: the tokens of the template behind the instruction.
        max_kl: nats, how much erasing may change the answers to the second set.
        min_steering: log odds that adding must bring about in the second set.
        blocks: those whose entering stream is a candidate; by default, as in the paper, all but the last fifth.

    Raises:
        UserError: no candidate is left.
    """

    def odds(prompts: Prompts) -> float:
        return float(log_odds(_last_logits(model, prompts), answers).mean())

    candidates = difference_of_means(model, first, second, positions)
    checked, others = check
    plain, before = _last_logits(model, others).log_softmax(-1), odds(checked)
    lost: Counter[str] = Counter()
    left: list[tuple[float, Direction]] = []
    chosen = range(int(len(candidates) * _FIRST)) if blocks is None else blocks
    for layer, at in product(chosen, range(len(positions))):
        vector = candidates[layer, at]
        if not vector.any():  # the same tokens before anything was read
            lost["zero"] += 1
            continue
        with erased(model, vector):
            after, odds_left = _last_logits(model, others).log_softmax(-1), odds(checked)
        with steered(model, vector, layer):
            steering = odds(others)
        kl = float((plain.exp() * (plain - after)).sum(-1).mean())
        if not kl <= max_kl:
            lost["KL"] += 1
        elif not steering >= min_steering:
            lost["steering"] += 1
        else:
            figures = {"kl": kl, "steering": steering, "log odds": before, "log odds when erased": odds_left}
            about = {name: f"{value:.4g}" for name, value in figures.items()}
            left.append((odds_left, Direction(vector.float(), layer, positions[at], about)))
    if not left:
        why = ", ".join(f"{count} by {rule}" for rule, count in lost.items())
        raise UserError(f"every direction fell out ({why}); allow a larger max_kl, or give more prompts and positions")
    return min(left, key=lambda one: one[0])[1]


def erased(model: nn.Module, vector: Tensor) -> AbstractContextManager[None]:
    """While open, the residual stream has nothing along ``vector [D]`` before and after every block."""
    unit = vector / vector.norm()
    return _between_blocks(model, lambda _, hidden: hidden - (hidden @ unit.to(hidden))[..., None] * unit.to(hidden))


def steered(model: nn.Module, vector: Tensor, layer: int) -> AbstractContextManager[None]:
    """While open, ``vector [D]`` is added to every token of the residual stream that enters block ``layer``."""
    return _between_blocks(model, lambda at, hidden: hidden + vector.to(hidden) if at == layer else hidden)


def log_odds(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """``log P - log(1 - P)`` of any of ``tokens`` coming next, ``[N]`` of ``logits [N, V]``."""
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    chosen[list(tokens)] = True
    return logits[:, chosen].logsumexp(-1) - logits[:, ~chosen].logsumexp(-1)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of ``model``: the outermost list of as many modules as its configuration says it has layers."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_hidden_layers", None)
    if not getattr(config, "is_encoder_decoder", False):
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
    raise UserError(f"the blocks of {type(model).__name__} are not known; find directions in a decoder of transformers")


@contextmanager
def _between_blocks(model: nn.Module, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """While open, ``change(l, hidden [B, T, D])`` of what enters block l, and of what leaves the last as l = L."""
    blocks = _blocks(model)

    def enter(layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(layer, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(layer, kwargs["hidden_states"])}

    def leave(block: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(len(blocks), output[0]), *output[1:])
        return change(len(blocks), output)

    with ExitStack() as hooks:
        for layer, block in enumerate(blocks):
            hooks.enter_context(block.register_forward_pre_hook(partial(enter, layer), with_kwargs=True))
        hooks.enter_context(blocks[-1].register_forward_hook(leave))
        yield


def _batches(model: nn.Module, prompts: Prompts) -> Iterator[Tensor]:
    """Prompts of one length together ``[B, T]``, so that none is padded, the shortest first."""
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = torch.stack([prompt for prompt in prompts if len(prompt) == length])
        yield from alike.to(device_of(model)).split(_BATCH)


@torch.no_grad()
def _last_logits(model: nn.Module, prompts: Prompts) -> Tensor:
    """Logits after the last token of each prompt, float64 ``[N, V]``, in the order of :func:`_batches`."""
    return torch.cat([model(input_ids=ids).logits[:, -1].double().cpu() for ids in _batches(model, prompts)])
