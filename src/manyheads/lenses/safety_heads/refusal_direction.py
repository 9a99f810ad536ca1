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

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
Change = Callable[[int, Tensor], Tensor]


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


def difference_of_means(
    model: nn.Module, first: Prompts, second: Prompts, positions: Sequence[int] = (-1,),
    blocks: Sequence[nn.Module] | None = None,
) -> Tensor:  # fmt: skip
    """``r[l, p]`` of every block and position: float64 ``[L, P, D]`` on the CPU.

    Args:
        model: a transformers model.
        first, second: prompts; each at least as long as the positions reach.
        positions: counted from the end, all below 0.
        blocks: of the model, in order; looked for when not given.
    """
    chosen = _blocks(model) if blocks is None else list(blocks)

    def mean(prompts: Prompts) -> Tensor:
        kept: list[list[Tensor]] = [[] for _ in chosen]

        def keep(layer: int, hidden: Tensor) -> Tensor:
            if layer < len(chosen):
                kept[layer].append(hidden.detach()[:, list(positions)].double().sum(0).cpu())
            return hidden

        with _between(chosen, keep):
            _last_logits(model, prompts)
        return torch.stack([torch.stack(sums).sum(0) for sums in kept]) / len(prompts)

    return mean(first) - mean(second)


def find_direction(
    model: nn.Module, first: Prompts, second: Prompts, *, answers: Sequence[int], check: tuple[Prompts, Prompts],
    positions: Sequence[int] = (-1,), max_kl: float = 0.1, min_steering: float = 0.0, skip_last: float = 0.2,
    blocks: Sequence[nn.Module] | None = None,
) -> Direction:  # fmt: skip
    """The direction that parts ``first`` from ``second`` and that the answer hangs on.

        found = find_direction(model, first, second, answers=[token], check=(more_first, more_second))
        found.save("refusal.safetensors")

    Args:
        model: a transformers model, in evaluation mode.
        first, second: prompts, as token ids; the paper takes 128 of each. For refusal: harmful and harmless.
        answers: the tokens with which answers to the first set begin.
        check: other prompts of both sets to choose by; the paper takes 32 of each.
        positions: candidates, counted from the end: the tokens of the template behind the instruction.
        max_kl: nats, how much erasing may change the answers to the second set.
        min_steering: log odds that adding must bring about in the second set.
        skip_last: part of the blocks, at the end, from which no direction is taken.
        blocks: of the model, in order; looked for when not given.

    Raises:
        UserError: no candidate is left.
    """
    chosen = _blocks(model) if blocks is None else list(blocks)
    candidates = difference_of_means(model, first, second, positions, chosen)
    checked, others = check
    plain = _last_logits(model, others).log_softmax(-1)
    before = float(log_odds(_last_logits(model, checked), answers).mean())
    lost = {"zero": 0, "KL": 0, "steering": 0}
    best: Direction | None = None
    least = float("inf")
    for layer in range(int(len(chosen) * (1 - skip_last))):
        for at, position in enumerate(positions):
            vector = candidates[layer, at]
            if not vector.any():  # the same tokens before anything was read
                lost["zero"] += 1
                continue
            with erased(model, vector, chosen):
                after = _last_logits(model, others).log_softmax(-1)
                kl = float((plain.exp() * (plain - after)).sum(-1).mean())
                left = float(log_odds(_last_logits(model, checked), answers).mean())
            with steered(model, vector, layer, chosen):
                steering = float(log_odds(_last_logits(model, others), answers).mean())
            if not kl <= max_kl:
                lost["KL"] += 1
            elif not steering >= min_steering:
                lost["steering"] += 1
            elif left < least:
                figures = {"kl": kl, "steering": steering, "log odds": before, "log odds when erased": left}
                about = {name: f"{value:.4g}" for name, value in figures.items()}
                best, least = Direction(vector.float(), layer, position, about), left
    if best is None:
        why = ", ".join(f"{count} by {rule}" for rule, count in lost.items() if count)
        raise UserError(f"every direction fell out ({why}); allow a larger max_kl, or give more prompts and positions")
    return best


@contextmanager
def erased(model: nn.Module, vector: Tensor, blocks: Sequence[nn.Module] | None = None) -> Iterator[None]:
    """While open, the residual stream has nothing along ``vector [D]`` before and after every block."""

    def project(layer: int, hidden: Tensor) -> Tensor:
        unit = (vector / vector.norm()).to(hidden)
        less: Tensor = hidden - (hidden @ unit)[..., None] * unit
        return less

    with _between(_blocks(model) if blocks is None else blocks, project):
        yield


@contextmanager
def steered(
    model: nn.Module, vector: Tensor, layer: int, blocks: Sequence[nn.Module] | None = None
) -> Iterator[None]:  # fmt: skip
    """While open, ``vector [D]`` is added to every token of the residual stream that enters block ``layer``."""

    def add(at: int, hidden: Tensor) -> Tensor:
        return hidden + vector.to(hidden) if at == layer else hidden

    with _between(_blocks(model) if blocks is None else blocks, add):
        yield


def log_odds(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """``log P - log(1 - P)`` of any of ``tokens`` coming next, ``[N]`` of ``logits [N, V]``."""
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    chosen[list(tokens)] = True
    odds: Tensor = logits[:, chosen].logsumexp(-1) - logits[:, ~chosen].logsumexp(-1)
    return odds


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of ``model``: the outermost list of as many modules as its configuration says it has layers."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_hidden_layers", None)
    if not getattr(config, "is_encoder_decoder", False):
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return list(module)
    raise UserError(f"the blocks of {type(model).__name__} are not known; pass blocks=, its layers in order")


@contextmanager
def _between(blocks: Sequence[nn.Module], change: Change) -> Iterator[None]:
    """While open, ``change(l, hidden [B, T, D])`` of what enters block l, and of what leaves the last as l = L."""

    def enter(layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (change(layer, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(layer, kwargs["hidden_states"])}

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(len(blocks), output[0]), *output[1:])
        return change(len(blocks), output)

    handles = [block.register_forward_pre_hook(enter(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles.append(blocks[-1].register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _last_logits(model: nn.Module, prompts: Prompts, batch: int = 64) -> Tensor:
    """Logits after the last token of each prompt, float64 ``[N, V]``; prompts of one length run together, unpadded."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    device = device_of(model)
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    for length in lengths.unique().tolist():
        for rows in (lengths == length).nonzero().flatten().split(batch):
            ids = torch.stack([prompts[row] for row in rows.tolist()]).to(device)
            logits = model(input_ids=ids).logits[:, -1].double().cpu()
            for row, each in zip(rows.tolist(), logits, strict=True):
                found[row] = each
    return torch.stack(found)
