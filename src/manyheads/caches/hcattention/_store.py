# SPDX-License-Identifier: Apache-2.0
"""The store of a cache with coded keys on the device and values on the host: what one forward does with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...attention import product_codes, reference
from ...attention.codec import FP8, INT4, Codec
from ...attention.offloaded import HostRows, decode_attention
from ...attention.reference import repeat_kv, widened
from ...call import AttentionCall, Site, Store
from ...errors import UserError
from ._coded import CodedTokens, Rows, align, by_slot, joined

if TYPE_CHECKING:
    from . import HCAttention

__all__ = ["OffloadStore"]

_SAMPLE = 16384  # tokens of a prompt that codebooks are fitted on, at equal distances
_PIECE = 2**16  # tokens of a long prompt that are coded at once
_ROOM = 64  # tokens after a prompt that there is room for


class OffloadStore(Store):
    """Tokens of one layer, exact until there are codebooks, then in :class:`CodedTokens`.

    Attributes:
        tokens: None while all tokens are exact.
        fetched: values that the last token needed, ``[B, Hkv]``; None before, and where several tokens came at once.
        mass: of attention, under the coded keys, that its kept tokens had, ``[B, H]``; likewise.
    """

    def __init__(self, strategy: HCAttention, site: Site) -> None:
        super().__init__(site)
        self.strategy = strategy
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._seen = 0
        self._new: Rows | None = None
        self._exact: Rows | None = None  # all tokens, while they are
        self._prompt: tuple[HostRows, HostRows] | None = None  # the same of a prompt in chunks
        self.tokens: CodedTokens | None = None
        self.fetched: Tensor | None = None
        self.mass: Tensor | None = None

    @property
    def seen(self) -> int:
        return self._seen

    @property
    def _waits(self) -> bool:
        """Whether keys are coded only when more of the prompt has come."""
        return self.prefilling

    @property
    def _window(self) -> int:
        """How many of the last tokens stay exact for now."""
        return self.strategy.recent

    @property
    def _last(self) -> Rows | None:
        return self._exact if self.tokens is None else self.tokens.recent

    @property
    def rows(self) -> int | None:
        if self._prompt is not None:
            return self._prompt[0].data.shape[1]
        return None if self._last is None else self._last[0].shape[0]

    @property
    def keys(self) -> Tensor | None:
        """Exact keys of the last tokens."""
        return None if self._last is None else self._last[0]

    @property
    def values(self) -> Tensor | None:
        """Values of the last tokens."""
        return None if self._last is None else self._last[1]

    @property
    def held(self) -> list[Tensor | None]:
        """Every tensor kept on the device."""
        found = [] if self.tokens is None else self.tokens.device
        return [*found, *(self._exact or ()), self.fetched, self.mass]

    @property
    def offloaded(self) -> list[Tensor | None]:
        """Every tensor kept in host memory."""
        found = [] if self.tokens is None else [self.tokens.values.data]
        return [*found, *(x.data for x in self._prompt or ())]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``[B, Hkv, T, d]``; return all tokens while they are exact, the new ones alone afterwards."""
        self._new = (k, v)
        self._seen += k.shape[2]
        if self.tokens is not None:
            return k, v
        parts = [self._new]
        if self._exact is not None:
            parts.insert(0, self._exact)
        if self._prompt is not None:
            parts.insert(0, (self._prompt[0].read(), self._prompt[1].read()))
        return parts[0] if len(parts) == 1 else joined(*parts)

    def attend(self, call: AttentionCall) -> Tensor | None:
        """Attention over codes, exact tokens and values on the host ``[B, T, H, dv]``; None while all are exact."""
        _check(call)
        if self.tokens is None or self._new is None:
            return None
        (tail, start), self._new = self.tokens.take(self._new), None
        self.fetched = self.mass = None
        if call.q.shape[2] > 1:
            return self._several(call, self.tokens, tail, start)
        tokens, strategy = self.tokens, self.strategy
        allowed = by_slot(call.mask, tokens.order)
        allowed = None if allowed is None else allowed[:, :, 0].any(1)
        k, v, seen, first = tokens.exact(allowed)
        if not tokens.coded:
            mask = None if seen is None else seen[:, None, None]
            return reference.attention(call.q, k, v, scale=call.scale, mask=mask, softcap=call.softcap).to(call.q.dtype)
        got = decode_attention(
            call.q[:, :, 0], tokens.codes, tokens.centroids, tokens.values, k, v, count=tokens.coded,
            scale=call.scale, exact_mask=seen, first=first,
            mask=None if allowed is None else allowed[:, : tokens.coded].expand(k.shape[0], -1),
            value_scale=tokens.value_scale, top_p=strategy.top_p, top_k=strategy.top_k,
            renormalize=strategy.renormalize, softcap=call.softcap, host=strategy.combine == "host",
        )  # fmt: skip
        self.fetched, self.mass = got.fetched, got.mass
        return got.out[:, None]

    def mask(self, call: AttentionCall) -> AttentionCall:
        """The call over all slots, where others act beside: what is not kept is hidden.

        Tokens of a chunk that comes after the prompt then are exact to each other.
        """
        _check(call)
        if self.tokens is None or self._new is None:
            return call
        if not self.strategy.renormalize:
            raise UserError("hcattention:renormalize=False cannot be used beside other strategies: leave it at True")
        (tail, start), self._new = self.tokens.take(self._new), None
        since = max(start, self._seen - call.q.shape[2] + 1 - self.strategy.recent)
        k, v = self.tokens.whole(tail, start, since)
        allowed, always = self._rules(call, self.tokens, torch.full((1, 1), since, device=k.device))
        x = reference.logits(widened(call.q), widened(k), scale=call.scale, softcap=call.softcap)
        return call.replace(k=k, v=v, mask=_weights(self.strategy, x, allowed, always) > 0, is_causal=False)

    def evict(self, call: AttentionCall) -> None:
        """While all tokens are exact: keep the new ones, and code all once the prompt is read."""
        if self.tokens is not None or self._new is None:
            return
        new, self._new = (self._new[0].detach(), self._new[1].detach()), None
        if self._waits or self._prompt is not None:
            if self._prompt is None:
                self._prompt = HostRows(new[0], capacity=self.prompt), HostRows(new[1], capacity=self.prompt)
                earlier, self._exact = self._exact, None
                new = new if earlier is None else joined(earlier, new)
            for rows, x in zip(self._prompt, new, strict=True):
                rows.append(x)
            if self._waits:
                return
        else:  # copied: what a module hands out may be a view of more
            self._exact = (new[0].clone(), new[1].clone()) if self._exact is None else joined(self._exact, new)
        given = self.strategy.given(self.site)
        if given is not None or self._seen >= 2 * self.strategy.centroids:
            self.tokens = _coded(self, None if call.mask is None else call.mask.any(2).any(1), given)
            self._exact = None
        elif self._prompt is not None:
            self._exact = (self._prompt[0].read().clone(), self._prompt[1].read().clone())
        self._prompt = None

    def _rules(self, call: AttentionCall, tokens: CodedTokens, since: Tensor) -> tuple[Tensor, Tensor]:
        """Who may be attended to, and who is kept whatever it scores: ``[B or 1, 1 or H, T or 1, S]``.

        ``since [T or 1, 1]``: from which slot on tokens are exact for a query.
        """
        slot = torch.arange(self._seen, device=call.q.device)
        query = torch.arange(self._seen - call.q.shape[2], self._seen, device=call.q.device)[:, None]
        pad = slot[:1] * 0 if tokens.pad is None else tokens.pad[:, None, None]
        allowed = (slot <= query) & (slot >= pad)
        always = (slot < pad + self.strategy.sinks) | (slot >= since)
        allowed, always = (x.view(-1, 1, *x.shape[-2:]) for x in (allowed, always))
        given = by_slot(call.mask, tokens.order)
        return (allowed if given is None else allowed & given), always

    def _several(self, call: AttentionCall, tokens: CodedTokens, tail: Rows, start: int) -> Tensor:
        """Attention of several queries ``[B, T, H, dv]``: each sees what it would see if it came by itself."""
        heads, count, seen = call.q.shape[1], call.q.shape[2], self._seen
        since = torch.arange(seen - count, seen, device=call.q.device)[:, None] + 1 - self.strategy.recent
        k, v = tokens.whole(tail, start, tokens.coded)
        left = slice(start, tokens.coded)  # coded now, exact for the first queries
        now = (x[:, :, : max(0, tokens.coded - start)] for x in tail)
        k, v, exact, value = (repeat_kv(widened(x), heads) for x in (k, v, *now))
        allowed, always = self._rules(call, tokens, since)
        step = reference.block_size(call.q, 4 * call.q.shape[0] * heads * seen)
        out = []
        for cut in (slice(i, i + step) for i in range(0, count, step)):
            q = widened(call.q[:, :, cut])
            x = reference.logits(q, k, scale=call.scale, softcap=call.softcap)
            if exact.shape[2]:
                own = reference.logits(q, exact, scale=call.scale, softcap=call.softcap)
                slot = torch.arange(start, tokens.coded, device=q.device)
                x[..., left] = torch.where(slot >= since[cut], own, x[..., left])
            weights = _weights(self.strategy, x, allowed[:, :, cut], always[:, :, cut])
            out.append(weights @ v)
            if exact.shape[2] and tokens.codec is not None:
                out[-1] += weights[..., left].masked_fill(slot < since[cut], 0.0) @ (value - v[:, :, left])
        return torch.cat(out, 2).transpose(1, 2).to(call.q.dtype)

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows ``[B']``."""
        if self.tokens is not None:
            self.tokens.reorder(rows)
        if self._exact is not None:
            at = rows.to(self._exact[0].device)
            self._exact = self._exact[0][at], self._exact[1][at]
        for x in self._prompt or ():
            x.reorder(rows)
        self.fetched = self.mass = None

    def crop(self, count: int) -> None:
        """Forget the last ``count`` tokens; refused once keys are coded."""
        if not count or not self._seen:
            return
        if self._exact is None:
            raise UserError(
                "a cache of hcattention cannot be cropped, keys that are coded do not become exact again: generate "
                "without an assistant or prompt lookup"
            )
        self._seen -= count
        self._exact = self._exact[0][:, :, : self._seen], self._exact[1][:, :, : self._seen]

    def state_dict(self) -> dict[str, Any]:
        exact, prompt = self._exact, None
        if self._prompt is not None:
            prompt = dict(zip("kv", (x.state_dict() for x in self._prompt), strict=True))
        return {
            "seen": self._seen, "tokens": None if self.tokens is None else self.tokens.state_dict(),
            "exact_k": None if exact is None else exact[0], "exact_v": None if exact is None else exact[1],
            "prompt": prompt,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reset()
        self._seen = state["seen"]
        self.tokens = None if state["tokens"] is None else CodedTokens.of(state["tokens"])
        self._exact = None if state["exact_k"] is None else (state["exact_k"], state["exact_v"])
        if state["prompt"] is not None:
            k, v = (state["prompt"][name]["rows"] for name in "kv")
            self._prompt = HostRows.of(k, k.device), HostRows.of(v, v.device)


def _check(call: AttentionCall) -> None:
    if call.bias is not None or call.sinks is not None:
        raise UserError(
            f"hcattention: {call.site.name} adds numbers to the logits, or has learned sinks, which its codes do "
            "not cover; use a model with rotary positions and a boolean mask"
        )


def _coded(store: OffloadStore, valid: Tensor | None, given: Tensor | None) -> CodedTokens:
    """All tokens that there are, coded but for the last; ``valid [B or 1, S]`` are no padding."""
    strategy, prompt = store.strategy, store._prompt
    codecs: dict[str, Codec] = {"fp8": FP8, "int4": INT4}
    codec = codecs.get(strategy.values)
    window, count = store._window, max(0, store._seen - store._window)
    capacity = max(count, strategy.capacity) + _ROOM
    whole, pad, order = store._exact, None, None
    if prompt is not None and (valid is None or bool(valid.all())):
        at = ((2 * torch.arange(min(_SAMPLE, store._seen)) + 1) * store._seen) // (2 * min(_SAMPLE, store._seen))
        prompt[0].settle()
        sample = prompt[0].data[at].to(prompt[0].device).permute(1, 2, 0, 3)
        end = prompt[0].read(count).clone(), prompt[1].read(count).clone()
    else:
        if prompt is not None:
            whole, prompt = (prompt[0].read(), prompt[1].read()), None
        assert whole is not None
        if valid is not None and not bool(valid.all()):
            whole, pad, order = align(*whole, valid.expand(len(whole[0]), -1))
        sample, end = whole[0], (whole[0][:, :, count:].clone(), whole[1][:, :, count:].clone())
    books = _books(store, sample, pad, given)
    if prompt is None or codec is not None:
        like = end[1] if codec is None else codec.encode(end[1])[0]
        values = HostRows(like, capacity=capacity)
    else:  # they lie there already
        values = prompt[1]
        values.size = 0
    tokens = CodedTokens.empty(books, end, window, strategy.sinks, values)
    tokens.pad, tokens.order = pad, order
    if strategy.prompt == "blocks":
        tokens.sums = widened(end[0][:, :, :0])
    tokens.reserve(capacity)
    for start in range(0, count, _PIECE):
        stop = min(start + _PIECE, count)
        if prompt is None and whole is not None:
            tokens.code(whole[0][:, :, start:stop], whole[1][:, :, start:stop])
        elif prompt is not None:
            tokens.code(prompt[0].read(start, stop), prompt[1].read(start, stop), written=codec is None)
    return tokens


def _books(store: OffloadStore, sample: Tensor, pad: Tensor | None, given: Tensor | None) -> Tensor:
    """Codebooks ``[B or 1, Hkv, g, c, w]``: those given, or fitted on keys ``[B, Hkv, N, d]``."""
    strategy = store.strategy
    if given is not None:
        if given.shape[1] * given.shape[3] != sample.shape[3]:
            raise UserError(f"the codebooks in {strategy.codebooks} are of other keys than {store.site.name} has")
        return given[None].to(sample.device, sample.dtype)
    real = None if pad is None else torch.arange(sample.shape[2], device=sample.device) >= pad[:, None]
    return product_codes.fit(
        sample, strategy.groups or max(1, sample.shape[3] // 2), strategy.centroids, real=real,
        iterations=strategy.iterations, sample=_SAMPLE,
    )  # fmt: skip


def _weights(strategy: HCAttention, x: Tensor, allowed: Tensor, always: Tensor) -> Tensor:
    """Weights of the kept tokens."""
    return product_codes.weights(x, allowed, strategy.top_p, strategy.top_k, always, strategy.renormalize)
