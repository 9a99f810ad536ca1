# SPDX-License-Identifier: Apache-2.0
"""A small network that finds where chunks of keys should end, shared by the layers of a model.

At each gap between two keys it reads the ``window`` keys on either side, those of all key/value heads as one vector:
an encoder that both sides share (self-attention of the window, layer norm, mean or gated pooling) gives l and r, and a
perceptron scores ``[l, r, |l - r|, l * r, cos(l, r)]``. What it learns is whether later tokens attend to the two sides
alike. With m the attention that rows behind both windows give to a side, mean over heads,

    ratio = (max(m_left, m_right) + eps) / (min(m_left, m_right) + eps)      label = sigmoid(4 log ratio)

so that a logit is four times a log ratio, a gap where both sides get the same has 0.5, and exchanging the sides changes
nothing. The loss is binary cross entropy with the focal weight ``|label - p|^2``, which for labels of 0 and 1 is the
usual ``(1 - p_true)^2``. Boundaries are the local maxima of the score, so far apart as asked, the best or all whose
ratio is above theta.

The paper's theta of 1.1 is read as a ratio; what eps is, it does not say. Legend: S keys, C channels of a key in all
heads together, w window, N gaps.
"""

import functools
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_similarity,
    linear,
    rms_norm,
    scaled_dot_product_attention,
)

from ...attention import reference
from ...call import AttentionCall, Site
from ...errors import UserError
from ...strategy import AttentionWatch

__all__ = ["Boundaries", "BoundaryConfig", "BoundaryNet", "cut", "fit_boundaries", "focal_loss", "labels"]

_EPS = 1e-6  # attention summed over rows, beside which less counts as nothing
_AT_ONCE = 8192  # windows encoded together
_SHARPNESS = 4.0
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class BoundaryConfig:
    """Sizes of the network.

    Attributes:
        channels: of a key, all key/value heads together.
        window: keys on either side of a gap.
        heads: of the encoder.
        hidden: width of the perceptron.
        pool: of a window: ``mean``, or ``gated``, weights by a softmax over its keys.
    """

    channels: int
    window: int = 4
    heads: int = 8
    hidden: int = 256
    pool: Literal["mean", "gated"] = "mean"


class BoundaryNet(nn.Module):
    """Logit of every gap."""

    def __init__(self, config: BoundaryConfig) -> None:
        super().__init__()
        wide = config.channels
        self.config = config
        self.attention = nn.MultiheadAttention(wide, math.gcd(config.heads, wide), batch_first=True)
        self.norm = nn.LayerNorm(wide)
        self.gate = nn.Linear(wide, 1) if config.pool == "gated" else None
        self.perceptron = nn.Sequential(
            nn.Linear(4 * wide + 1, config.hidden), nn.GELU(), nn.Linear(config.hidden, 1)
        )  # fmt: skip

    def encode(self, windows: Tensor) -> Tensor:
        """``[N, w, C] -> [N, C]``."""
        x = rms_norm(windows, windows.shape[-1:])
        return self._pooled(x, self._projected(x))

    def _projected(self, x: Tensor) -> Tensor:
        """Queries, keys and values ``[..., 3 C]`` of ``[..., C]``: a token's are the same in all its windows."""
        return linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias)

    def _pooled(self, x: Tensor, projected: Tensor) -> Tensor:
        """What :attr:`attention` makes of windows ``[N, w, C]``, added, normalised and pooled."""
        q, k, v = projected.unflatten(-1, (3, self.attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm(x + self.attention.out_proj(mixed))
        pooled: Tensor = x.mean(1) if self.gate is None else (self.gate(x).softmax(1) * x).sum(1)
        return pooled

    def compare(self, left: Tensor, right: Tensor) -> Tensor:
        """Logits ``[N]`` of encoded sides ``[N, C]``."""
        near = cosine_similarity(left, right, dim=-1)[:, None]
        x = torch.cat([left, right, (left - right).abs(), left * right, near], -1)
        logits: Tensor = self.perceptron(x)[:, 0]
        return logits

    def forward(self, keys: Tensor) -> Tensor:
        """Logits ``[S + 1]`` of the gaps before each of the keys ``[S, C]`` and at the end; -inf at either end."""
        size, wide = len(keys), self.config.window
        found = keys.new_full((size + 1,), -torch.inf)
        if size >= 2 * wide:
            keys = rms_norm(keys, keys.shape[-1:])
            windows = [x.unfold(0, wide, 1).mT.split(_AT_ONCE) for x in (keys, self._projected(keys))]
            sides = torch.cat([self._pooled(*parts) for parts in zip(*windows, strict=True)])  # [S - w + 1, C]
            found[wide : size - wide + 1] = self.compare(sides[:-wide], sides[wide:])
        return found


def labels(weights: Tensor, window: int) -> Tensor:
    """Soft labels of the gaps from attention ``[T, S]`` (T = S, causal, mean over heads): ``[S + 1]``.

    A gap counts the rows behind its right window; where there is none, or no window, it is NaN.
    """
    size = len(weights)
    later = weights.flip(0).cumsum(0).flip(0)  # [t, s]: what rows from t on give to s
    found = weights.new_full((size + 1,), torch.nan)
    if size <= 2 * window:
        return found
    sums = torch.nn.functional.pad(later.cumsum(1), (1, 0))
    gap = torch.arange(window, size - window, device=weights.device)
    row = gap + window
    left = sums[row, gap] - sums[row, gap - window]
    right = sums[row, gap + window] - sums[row, gap]
    found[gap] = soft_label(left, right)
    return found


def soft_label(left: Tensor, right: Tensor) -> Tensor:
    """``sigmoid(4 log ratio)`` of the attention that two sides get; 0.5 where it is the same."""
    ratio = (torch.maximum(left, right) + _EPS) / (torch.minimum(left, right).clamp(min=0) + _EPS)
    return (_SHARPNESS * ratio.log()).sigmoid()


def focal_loss(logits: Tensor, label: Tensor, gamma: float = 2.0) -> Tensor:
    """Mean binary cross entropy with soft labels, each weighted by ``|label - p|^gamma``."""
    weight = (label - logits.sigmoid()).abs() ** gamma
    return (weight * binary_cross_entropy_with_logits(logits, label, reduction="none")).mean()


def cut(scores: Tensor, nms: int, *, most: int | None = None, theta: float | None = None) -> Tensor:
    """Bounds of chunks: gaps that no better one is nearer to than ``nms``, the best ``most`` or all over ``theta``.

    Args:
        scores: ``[S + 1]`` logits of the gaps before each key and behind the last.
        nms: least distance of two boundaries; of equal ones the earlier stays.
        most: boundaries at most, besides the ends.
        theta: ratio of attention, 1 or more.

    Returns:
        Ascending columns, 0 and S among them.
    """
    size, device = len(scores) - 1, scores.device
    inner = scores.clone()
    inner[0] = inner[size] = -torch.inf
    if theta is not None:
        inner = inner.masked_fill(inner <= _SHARPNESS * math.log(theta), -torch.inf)
    padded = torch.nn.functional.pad(inner, (nms - 1, nms - 1), value=-torch.inf)
    near = padded.unfold(0, 2 * nms - 1, 1)  # [S + 1, 2 nms - 1], the gap in the middle
    earlier = near[:, : nms - 1].amax(1) if nms > 1 else torch.full_like(inner, -torch.inf)
    later = near[:, nms:].amax(1) if nms > 1 else torch.full_like(inner, -torch.inf)
    kept = (inner > earlier) & (inner >= later) & (inner > -torch.inf)
    ranked = inner.masked_fill(~kept, -torch.inf)
    if most is not None and most < size:
        best = ranked.sort(descending=True, stable=True).indices[:most]
        kept = kept & torch.zeros_like(kept).scatter(0, best, True)
    gaps = kept.nonzero()[:, 0]
    return torch.cat([gaps.new_zeros(1), gaps, torch.tensor([size], device=device)])


@dataclass(frozen=True)
class Boundaries:
    """A trained predictor.

    Attributes:
        net: the network, in evaluation mode.
        about: what it was trained on and how well it does on texts that it was not.
    """

    net: BoundaryNet
    about: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def scores(self, keys: Tensor) -> Tensor:
        """Logits of the gaps of ``keys [Hkv, S, d]``, float32 ``[S + 1]``.

        Raises:
            UserError: the keys have other channels than those it was trained on.
        """
        joined = keys.transpose(0, 1).flatten(1).float()
        if joined.shape[1] != self.net.config.channels:
            raise UserError(
                f"the boundaries were fitted to keys of {self.net.config.channels} channels in all heads together, "
                f"and these have {joined.shape[1]}: fit them to this model"
            )
        found: Tensor = self.net(joined)
        return found

    def save(self, folder: str | Path) -> Path:
        """Write ``config.json`` and ``model.safetensors``, which ``dhsa:boundaries=FOLDER`` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"network": asdict(self.net.config), "about": self.about}
        (folder / _CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        weights = {name: x.detach().cpu().contiguous() for name, x in self.net.state_dict().items()}
        save_file(weights, str(folder / _WEIGHTS))
        return folder

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu") -> "Boundaries":
        """Read what :meth:`save` wrote.

        Raises:
            UserError: the folder holds no boundaries.
        """
        folder = Path(folder).expanduser()
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
            net = BoundaryNet(BoundaryConfig(**config["network"]))
            net.load_state_dict(load_file(str(folder / _WEIGHTS)))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{folder} holds no boundaries ({error}); write them by fit_boundaries(...).save") from None
        return cls(net.to(device).eval(), config["about"])

    @classmethod
    def of(cls, folder: str, device: torch.device) -> "Boundaries":
        """The same, or one that ships of that name; read once a process unless the file has changed."""
        place, shipped = Path(folder).expanduser(), Path(__file__).parent / folder
        if not place.exists() and (shipped / _WEIGHTS).is_file():
            place = shipped
        path = place / _WEIGHTS
        return _kept(str(place), path.stat().st_mtime_ns if path.is_file() else 0, str(device))


@functools.lru_cache(maxsize=8)
def _kept(folder: str, changed: int, device: str) -> Boundaries:
    del changed
    return Boundaries.load(folder, device)


@dataclass(frozen=True, kw_only=True)
class _Collector(AttentionWatch):
    """Keeps the keys of each site and the labels of their gaps."""

    window: int
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False)

    def selects(self, site: Site) -> bool:
        return site.causal and site.kind == "self" and site.window is None and super().selects(site)

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        call.require_softmax()
        allowed = call.allowed()
        for b in range(call.q.shape[0]):
            x = reference.logits(call.q[b : b + 1].float(), call.k[b : b + 1].float(), scale=call.scale)
            weights = reference.softmax(x, None if allowed is None else allowed[b % len(allowed)][None])
            keys = call.k[b].transpose(0, 1).flatten(1)
            self.found.append((keys.float().cpu(), labels(weights[0].mean(0), self.window).cpu()))


def fit_boundaries(
    model: nn.Module, ids: Tensor, *, port: Callable[[nn.Module, Any], AbstractContextManager[Any]],
    steps: int = 300, batch: int = 512, rate: float = 1e-3, held_out: int = 1, window: int = 4,
    pool: Literal["mean", "gated"] = "mean", seed: int = 0, device: torch.device | str | None = None,
) -> Boundaries:  # fmt: skip
    """Train a predictor on the keys and the attention of a model that stays as it is.

    Args:
        model: a causal language model, in evaluation mode.
        ids: ``[N, T]`` token ids of texts, of which the last ``held_out`` are kept to measure on.
        port: what opens the model for a strategy: :func:`manyheads.use`.
        steps, batch, rate: of AdamW, gaps drawn from all layers and texts.
        held_out: texts that are not trained on; below N.
        window, pool: of the network.
        seed: of the weights and of the gaps drawn.
        device: to train on, the model's if None.

    Returns:
        The predictor. ``about`` has the focal loss on the held-out texts, that of always saying their mean label, and
        the correlation of the logit with the true log ratio.

    Raises:
        UserError: too few or too short texts.
    """
    count, length = ids.shape
    if not 1 <= held_out < count or length <= 4 * window:
        raise UserError(f"give two texts or more, of more than {4 * window} tokens, and hold out fewer than all")
    home = next(model.parameters()).device
    collector = _Collector(window=window)
    with torch.no_grad(), port(model, collector):
        for row in ids.split(1):
            model(input_ids=row.to(home), use_cache=False)
    sites = len(collector.found) // count
    device = home if device is None else torch.device(device)
    train, test = (
        _Gaps.of(part, window, device)
        for part in (collector.found[: sites * (count - held_out)], collector.found[sites * (count - held_out) :])
    )
    generator = torch.Generator().manual_seed(seed)
    config = BoundaryConfig(channels=train.keys.shape[1], window=window, pool=pool)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = BoundaryNet(config)
    net = net.to(device).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(train.label), (batch,), generator=generator).to(device)
        loss = focal_loss(train.logits(net, chosen), train.label[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.eval()
    return Boundaries(
        net, {"texts": count - held_out, "tokens": length, "steps": steps, "seed": seed, **test.judged(net)}
    )


@dataclass(frozen=True)
class _Gaps:
    """Gaps of several keys in a row: ``keys [S, C]`` of all of them, where each gap is, and its label."""

    keys: Tensor
    at: Tensor
    label: Tensor
    window: int

    @classmethod
    def of(cls, found: list[tuple[Tensor, Tensor]], window: int, device: torch.device) -> "_Gaps":
        at, values, start = [], [], 0
        for keys, label in found:
            inside = label.isfinite().nonzero()[:, 0]
            at.append(inside + start)
            values.append(label[inside])
            start += len(keys)
        keys = torch.cat([keys for keys, _ in found])
        return cls(keys.to(device), torch.cat(at).to(device), torch.cat(values).float().to(device), window)

    def logits(self, net: BoundaryNet, chosen: Tensor) -> Tensor:
        beside = self.at[chosen, None] + torch.arange(-self.window, self.window, device=self.at.device)
        left, right = self.keys[beside].split(self.window, 1)
        return net.compare(net.encode(left), net.encode(right))

    @torch.no_grad()
    def judged(self, net: BoundaryNet) -> dict[str, float]:
        every = torch.arange(len(self.label), device=self.at.device)
        logits = torch.cat([self.logits(net, part) for part in every.split(_AT_ONCE)])
        constant = torch.logit(self.label.mean()).expand_as(logits)
        known = torch.logit(self.label.double().clamp(max=1 - 1e-6))
        correlation = torch.corrcoef(torch.stack([logits.double(), known]))[0, 1]
        return {
            "held_out_loss": float(focal_loss(logits, self.label)),
            "held_out_loss_of_the_mean": float(focal_loss(constant, self.label)),
            "held_out_correlation": float(correlation),
        }
