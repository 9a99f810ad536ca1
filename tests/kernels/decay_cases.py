# SPDX-License-Identifier: Apache-2.0
"""Inputs of decay attention that lie amid NaN, and everything that comes out of it: outputs, states, gradients."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

import tolerance
from kernels.cases import poisoned
from manyheads.attention import recurrence
from manyheads.attention.recurrence import DecayState, decay_attention

# Outputs and gradients. A gradient in 16 bits has rounded weights on both sides of a product; in float32 the limits
# leave room for the division by a normaliser. With the sum of the weights as normaliser a gradient is the difference of
# two larger terms, one of which is made from the output as it was rounded to 16 bits.
LIMIT = {
    torch.float32: (5e-6, 1e-5),
    torch.float16: (tolerance.HALF[torch.float16], 2 * tolerance.HALF[torch.float16]),
    torch.bfloat16: (tolerance.HALF[torch.bfloat16], 2 * tolerance.HALF[torch.bfloat16]),
}
NAMES = ("q", "k", "v", "g", "floor", "kv", "n")


def amid_nan(x: Tensor, heads_first: bool) -> Tensor:
    """The same numbers as a view into a larger tensor of NaN; heads before or after tokens in memory."""
    batch, heads, length, dim = x.shape
    shape = (batch, heads, length + 3, dim + 16) if heads_first else (batch, length + 3, heads, dim + 16)
    room = x.new_full(shape, torch.nan)
    view = (room if heads_first else room.transpose(1, 2))[:, :, 1 : length + 1, :dim]
    view.copy_(x)
    return view


@dataclass
class Case:
    """Arguments of ``decay_attention`` in float32, and the dtype of q, k and v."""

    given: dict[str, Tensor | None]
    dtype: torch.dtype
    norm: str | None
    scale: float
    cu_seqlens: Tensor | None
    final: bool = True

    def but(self, **changes: Tensor | None) -> "Case":
        return replace(self, given={**self.given, **changes})

    def run(self, impl: str, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
        """Output, state and gradients of a random sum of both; ``dtype`` replaces that of all inputs."""
        held: dict[str, Tensor | None] = {}
        for name, x in self.given.items():
            if x is None:
                held[name] = None
                continue
            own = self.dtype if name in ("q", "k", "v") else torch.float32
            x = x.to(own).to(dtype or own).to(device)
            if dtype is None and name in ("q", "k", "v"):
                x = amid_nan(x, heads_first=name == "v")
            held[name] = x.detach().requires_grad_()
        cu = None if self.cu_seqlens is None else self.cu_seqlens.to(device)
        q, k, v, g, floor, kv, n = (held[name] for name in NAMES)
        state = None if kv is None else DecayState(kv, n)
        out, after = decay_attention(
            q, k, v, g, scale=self.scale, norm=self.norm, floor=floor, state=state, cu_seqlens=cu, impl=impl
        )
        made = {"out": out, "state": after.kv}
        if self.norm:
            made["vector"] = after.k
        source = torch.Generator().manual_seed(3)
        loss = 0.0
        for name, x in made.items():
            weight = torch.randn(x.shape, generator=source, dtype=torch.float64).to(device)
            if name == "out" or self.final:
                loss = loss + (x.double() * weight).sum()
        leaves = {name: x for name, x in held.items() if x is not None}
        grads = torch.autograd.grad(loss, list(leaves.values()))
        made |= {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {name: x.detach().cpu() for name, x in made.items()}


def build(
    *, length: int = 65, batch: int = 1, heads: int = 2, kv_heads: int = 1, width: int = 16, columns: int = 16,
    gate: str = "token", norm: str | None = None, dtype: torch.dtype = torch.float32, start: bool = True,
    packed: list[int] | None = None, final: bool = True,
) -> Case:  # fmt: skip
    """A random case; ``packed`` are bounds of sequences."""
    if packed is not None:
        batch, length = 1, packed[-1]
    rows = batch if packed is None else len(packed) - 1
    q, k = torch.randn(batch, heads, length, width), torch.randn(batch, kv_heads, length, width)
    if norm == "sum":
        q, k = q.abs(), k.abs()
    g = {"none": None, "head": -torch.rand(kv_heads) / 4, "token": -torch.rand(batch, kv_heads, length)}[gate]
    given = {
        "q": q,
        "k": k,
        "v": torch.randn(batch, kv_heads, length, columns),
        "g": g,
        "floor": torch.rand(batch, heads, length) + 0.5 if norm == "mlstm" else None,
        "kv": torch.randn(rows, kv_heads, width, columns) if start else None,
        "n": torch.rand(rows, kv_heads, width) if start and norm else None,
    }
    bounds = None if packed is None else torch.tensor(packed)
    return Case(given, dtype, norm, width**-0.5, bounds, final)


def errors(case: Case, got: dict[str, Tensor], device: str = "cpu") -> dict[str, float]:
    """Relative errors against the definition in float64."""
    want = case.run("quadratic", torch.float64, device)
    if (g := case.given["g"]) is not None and g.ndim == 1:  # a sum of signed terms: against the sum of their sizes
        batch, heads, length, _ = case.given["k"].shape  # type: ignore[union-attr]
        terms = case.but(g=g[None, :, None].expand(batch, heads, length)).run("quadratic", torch.float64, device)["dg"]
        wrong = (got["dg"].double() - want["dg"]).abs() / terms.abs().sum((0, 2))
        return {name: tolerance.error(got[name], want[name]) for name in want if name != "dg"} | {
            "dg": float(wrong.nan_to_num(torch.inf).max())
        }
    return {name: tolerance.error(got[name], want[name]) for name in want}


def worst(case: Case, got: dict[str, Tensor], device: str = "cpu") -> float:
    """The largest error, in units of its limit."""
    out, grad = LIMIT[case.dtype]
    if case.norm == "sum":
        grad *= 3
    return max(e / (grad if name.startswith("d") else out) for name, e in errors(case, got, device).items())


def kernel(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    got: dict[str, Tensor] = poisoned(case.run, "triton", device=device)  # type: ignore[assignment]
    return got


def wrong_variants(case: Case) -> dict[str, Case]:
    """Cases that ``case``'s results must not agree with."""
    given = case.given
    made = {} if case.norm == "sum" else {"another scale": replace(case, scale=1.1 * case.scale)}
    if given["g"] is not None and given["g"].ndim == 3:
        made["decay one token late"] = case.but(g=given["g"].roll(1, 2))
        made["no decay"] = case.but(g=torch.zeros_like(given["g"]))
    if case.norm == "sum":
        made["no state of the normaliser"] = case.but(n=torch.zeros_like(given["n"]))
    if case.norm == "mlstm":
        made["no floor"] = case.but(floor=torch.full_like(given["floor"], 1e-3))
    if given["kv"] is not None and len(given["kv"]) > 1:
        made["the state of another sequence"] = case.but(kv=given["kv"].flip(0))
    if case.cu_seqlens is not None:
        bounds = case.cu_seqlens.clone()
        bounds[1] += 1
        made["bounds off by one"] = replace(case, cu_seqlens=bounds)
    return made


class Line:
    """Shares of a sequence one after the other, each given what those before left; on the way back, those after."""

    def __init__(self, lost: bool = False):
        self.states, self.lost = {False: 0.0, True: 0.0}, lost

    def begin(self, m, s, reverse=False):
        before = self.states[reverse] + torch.zeros_like(s)
        self.states[reverse] = m[..., None] * before + s
        return lambda: before * (not (self.lost and reverse))


def in_shares(cuts, overlap, line):
    """``decay_attention`` of shares that end at ``cuts``, by the kernels."""
    from manyheads.kernels.shared_recurrence import shared_decay_attention

    def attend(q, k, v, g, *, scale, norm, floor, state, cu_seqlens, impl):
        if impl != "triton":
            return recurrence.decay_attention(q, k, v, g, scale=scale, norm=norm, floor=floor, state=state, impl=impl)
        outs, given = [], (None, None) if state is None else (state.kv, state.k)
        for a, b in pairwise([0, *cuts, q.shape[2]]):
            gate = g if g is None or g.ndim == 1 else g[:, :, a:b]
            floors = None if floor is None else floor[:, :, a:b]
            parts = q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], gate, scale, norm, floors
            out, *after = shared_decay_attention(*parts, *given, line.begin, overlap)
            outs.append(out)
            given = (None, None)
        return torch.cat(outs, 2), DecayState(*after)

    return attend
