# SPDX-License-Identifier: Apache-2.0
"""What every cache strategy must have: functions of a model and a strategy that raise AssertionError if it has not.

Where two paths compute the same in another order of summation, give a model in float64: strategies choose what to drop
by scores, beam search chooses tokens, and what nearly ties in float32 is chosen by rounding. Tokens of greedy decoding
are not compared between such paths: logits are, along the tokens of one of them (``forced``).
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

import manyheads
from manyheads.integrations.cache import cache_arguments
from manyheads.integrations.transformers import new_cache
from oracles.models import tokens
from tolerance import BYTES, SAME, assert_close, error

LENGTHS = (17, 4, 11)  # of the rows of a batch
HUGE = 1e4


def step(model: Any, ids: Tensor, cache: Any, **extra: Any) -> Tensor:
    """Logits of one forward with ``cache``."""
    with torch.no_grad():
        logits: Tensor = model(ids, **cache_arguments(model, cache), **extra).logits
    return logits


def prefilled(model: Any, strategy: Any, ids: Tensor, record: int = 0, **extra: Any) -> Any:
    """A cache that has seen ``ids``; a port must be open."""
    cache = new_cache(model, manyheads.parse(strategy), record=record)
    step(model, ids, cache, **extra)
    return cache


def stores(cache: Any) -> list[Any]:
    return [layer.store for layer in cache.layers if hasattr(layer, "store")]


def greedy(
    model: Any, ids: Tensor, mask: Tensor | None = None, count: int = 8, *, forced: Tensor | None = None, **extra: Any
) -> tuple[Tensor, Tensor]:
    """New tokens ``[B, count]`` and their logits ``[B, count, V]``; ``forced [B, count]`` are taken whatever these say.

    The logits are those of the model, before anything is forced.
    """
    mask = torch.ones_like(ids) if mask is None else mask
    if forced is not None:
        start, count = ids.shape[1], forced.shape[1]

        def force(so_far: Tensor, scores: Tensor) -> Tensor:
            wanted = forced[:, so_far.shape[1] - start, None]
            return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)

        extra["logits_processor"] = LogitsProcessorList([force])
    made = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **extra,
    )  # fmt: skip
    return made["sequences"][:, ids.shape[1] :], torch.stack(made["logits"], 1)


def _rows(side: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows alone, and the padded batch with its mask; the padding is filled with tokens like any other."""
    width, rows = max(LENGTHS), [tokens(n, seed=n) for n in LENGTHS]
    ids, mask = tokens(len(rows), width, seed=99), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        cut = slice(width - len(row), None) if side == "left" else slice(len(row))
        ids[i, cut], mask[i, cut] = row, 1
    return rows, ids, mask


def batch_equals_singles_padded_left(model: Any, strategy: Any) -> None:
    """``generate``: logits of a row do not depend on its neighbours and their length, nor on what fills the padding."""
    rows, ids, mask = _rows("left")
    with manyheads.use(model, strategy):
        together, logits = greedy(model, ids, mask)
        for i, row in enumerate(rows):
            _, own = greedy(model, row[None], forced=together[i : i + 1])
            assert_close(logits[i], own[0], 10 * SAME)


def beams_equal_singles(model: Any, strategy: Any) -> None:
    """Beam search reorders what the cache remembers at every step; a padded batch gives the beams of its rows."""
    rows, ids, mask = _rows("left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 7}
    with manyheads.use(model, strategy):
        together = model.generate(ids, attention_mask=mask, **beams)[:, ids.shape[1] :]
        for i, row in enumerate(rows):
            alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **beams)[:, len(row) :]
            assert torch.equal(together[2 * i : 2 * i + 2], alone), f"row {i}"


def batch_equals_singles_padded_right(model: Any, strategy: Any, count: int = 6) -> None:
    """A right-padded prefill and a decoding loop by hand, each row at its own positions."""
    rows, ids, mask = _rows("right")
    lengths = mask.sum(1)
    with manyheads.use(model):
        cache = new_cache(model, manyheads.parse(strategy))
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits = model(ids, attention_mask=mask, position_ids=positions, **cache_arguments(model, cache)).logits
        logits, together, all_logits = logits[torch.arange(len(rows)), lengths - 1], [], []
        for t in range(count):
            all_logits.append(logits)
            together.append(logits.argmax(-1))
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = step(model, together[-1][:, None], cache, attention_mask=mask,
                          position_ids=(lengths + t)[:, None])[:, -1]  # fmt: skip
    for i, row in enumerate(rows):
        with manyheads.use(model, strategy):
            _, own = greedy(model, row[None], forced=torch.stack(together, 1)[i : i + 1])
        assert_close(torch.stack(all_logits, 1)[i], own[0], 10 * SAME)


SPANS = (((2, 5), (9, 11)), ((0, 1),), ((6, 9), (12, 30)))  # of each row; the last reaches what is yet to come


def protected_stay(model: Any, strategy: Any, padded: bool = True) -> None:
    """Tokens that ``protect`` names stay in every head and layer as they came, at whatever step, in each row its own.

    They count from the first token of the row, padding left out. What the strategy does without ``protect`` drops some
    of them, and after a reordering of rows the spans have moved with these.
    """
    _, ids, mask = _rows("left")
    if not padded:
        ids, mask = tokens(3, 17), torch.ones(3, 17, dtype=torch.long)
    lost = 0
    with manyheads.use(model):
        for spans in (SPANS, ()):
            cache = new_cache(model, manyheads.parse(strategy).protecting(spans))
            full = new_cache(model, manyheads.parse("full"))
            more, order, own = mask, torch.tensor([2, 0, 1]), list(SPANS)
            for t, new in enumerate((None, 1, 1, 4, 1, 1)):
                fed = ids if new is None else tokens(3, new, seed=t)
                more = more if new is None else torch.cat([more, more.new_ones(3, new)], 1)
                step(model, fed, cache, attention_mask=more)
                step(model, fed, full, attention_mask=more)
                lost += _missing(cache, full, own, check=bool(spans))
                if t == 1:
                    cache.reorder_cache(order)
                    full.reorder_cache(order)
                    more, own = more[order], [own[i] for i in order.tolist()]
    assert lost, "nothing is dropped in the first place"


def protected_rows_equal_singles(model: Any, strategy: Any) -> None:
    """A padded batch with spans for each row gives what every row gives alone with its own."""
    rows, ids, mask = _rows("left")
    with manyheads.use(model, strategy, protect=SPANS):
        together, logits = greedy(model, ids, mask)
    for i, row in enumerate(rows):
        with manyheads.use(model, strategy, protect=SPANS[i]):
            _, own = greedy(model, row[None], forced=together[i : i + 1])
        assert_close(logits[i], own[0], 10 * SAME)


def _missing(cache: Any, full: Any, spans: list[Any], check: bool) -> int:
    """Tokens of ``spans`` that a head of ``cache`` does not hold, or, with ``check``, an error if there is any."""
    missing = 0
    for layer, (store, whole) in enumerate(zip(stores(cache), stores(full), strict=True)):
        held, every = store._copy, whole._copy
        places, here = held.positions(), every.positions()
        for row, own in enumerate(spans):
            count = int(every.counts()[row])
            for at in {p for start, stop in own for p in range(start, min(stop, count))}:
                for head in range(places.shape[1]):
                    found = (places[row, head] == at).nonzero()[:, 0]
                    missing += len(found) != 1
                    if not check:
                        continue
                    assert len(found) == 1, f"token {at} of row {row} is not in head {head} of layer {layer}"
                    if layer == 0 and store.policy.codec is None:  # later layers see what was dropped
                        column = (here[row, head] == at).nonzero()[0, 0]
                        assert_close(held.values[row, head, found[0]], every.values[row, head, column])
                        assert_close(held.keys[row, head, found[0]], every.keys[row, head, column])
    return missing


def _packed(strategy: Any) -> float | None:
    """Limit where what is kept was packed: codes are made and read in float32, whatever the model computes in."""
    return None if getattr(manyheads.parse(strategy), "codec", None) is None else SAME


def padding_is_never_read(model: Any, strategy: Any) -> None:
    """Huge numbers in every slot that holds padding, or nothing, change nothing."""
    _, ids, mask = _rows("left")
    more = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    with manyheads.use(model):
        cache = prefilled(model, strategy, ids, attention_mask=mask)
        poisoned = copy.deepcopy(cache)
        for store in stores(poisoned):
            empty = store.live.positions() < 0
            assert bool(empty.any())
            store.live.keys[empty], store.live.values[empty] = HUGE, HUGE
        last = tokens(len(ids), 1, seed=5)
        assert_close(
            step(model, last, poisoned, attention_mask=more),
            step(model, last, cache, attention_mask=more),
            _packed(strategy),
        )


def every_kept_slot_matters(model: Any, strategy: Any, replaces_first: bool = False) -> None:
    """Changing the value of any kept slot moves the logits of its own row, and of no other (D4).

    ``replaces_first``: the new token takes the place of an old one before attention, which therefore may go unseen.
    """
    _, ids, mask = _rows("left")
    more = torch.cat([mask, mask.new_ones(len(ids), 1)], 1)
    last = tokens(len(ids), 1, seed=5)
    with manyheads.use(model):
        cache = prefilled(model, strategy, ids, attention_mask=mask)
        after = copy.deepcopy(cache)
        plain = step(model, last, after, attention_mask=more)
        for layer, store in enumerate(stores(cache)):
            positions = store.live.positions()
            filled = positions >= 0
            if replaces_first:
                left = stores(after)[layer].live.positions()
                filled = filled & (positions[..., None] == left[:, :, None]).any(-1)
            assert bool(filled.any(-1).all()), "a row keeps nothing"
            for row, head, slot in filled.nonzero().tolist():
                changed = copy.deepcopy(cache)
                stores(changed)[layer].live.values[row, head, slot] += HUGE
                moved = (step(model, last, changed, attention_mask=more) - plain).abs().amax((1, 2))
                others = [i for i in range(len(ids)) if i != row]
                assert moved[row] > 1e-3 and bool((moved[others] < 1e-3).all()), f"slot {slot} of head {head}: {moved}"


def off_means_off(model: Any, *strategies: Any) -> None:
    """Strategies with room for everything: bit-equal to the untouched model, padded batch and all."""
    _, ids, mask = _rows("left")
    want_tokens, want = greedy(model, ids, mask)
    for strategy in strategies:
        with manyheads.use(model, strategy):
            got_tokens, got = greedy(model, ids, mask)
        assert torch.equal(got_tokens, want_tokens) and torch.equal(got, want), strategy


def on_means_on(model: Any, strategy: Any) -> None:
    ids = tokens(2, 24)
    _, want = greedy(model, ids)
    with manyheads.use(model, strategy):
        _, got = greedy(model, ids)
    assert error(got, want) > 1e-2


def _walk(thing: Any, found: dict[int, int], seen: set[int]) -> None:
    """Storages of all tensors that can be reached from ``thing`` through attributes and containers."""
    if id(thing) in seen or isinstance(thing, (str, int, float, type, torch.nn.Module)):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        for item in thing.values():
            _walk(item, found, seen)
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            _walk(item, found, seen)
    else:
        names = [n for cls in type(thing).__mro__ for n in getattr(cls, "__slots__", ())]
        for item in [getattr(thing, n, None) for n in names] + list(getattr(thing, "__dict__", {}).values()):
            _walk(item, found, seen)


def held(cache: Any) -> int:
    """Bytes of all storages that ``cache`` keeps alive."""
    found: dict[int, int] = {}
    _walk(stores(cache), found, set())
    return sum(found.values())


def bytes_are_real(model: Any, strategy: Any) -> None:
    """``bytes()`` is what is held, after the prompt and after every step; keys and values shrink as announced (D5)."""
    ids = tokens(2, 60)
    with manyheads.use(model):
        cache, full = prefilled(model, strategy, ids), prefilled(model, "full", ids)
        parts = [
            sum(x.untyped_storage().nbytes() for s in stores(c) for x in (s.keys, s.values)) for c in (cache, full)
        ]
        slots = [sum(s.keys.shape[2] for s in stores(c)) for c in (cache, full)]
        assert abs(parts[0] / parts[1] - slots[0] / slots[1]) <= BYTES
        for t in range(4):
            assert abs(cache.bytes() - held(cache)) <= BYTES * held(cache), (
                f"{cache.bytes()} of {held(cache)} after {t}"
            )
            step(model, tokens(2, 1, seed=t), cache)
            step(model, tokens(2, 1, seed=t), full)
        slots = [sum(s.keys.shape[2] for s in stores(c)) for c in (cache, full)]
        assert slots[0] < 0.8 * slots[1] and cache.bytes() < 0.9 * full.bytes()


def slot_order_is_free(model: Any, strategy: Any) -> None:
    """Shuffling the slots of each row and head, with all that belongs to them, changes nothing but rounding."""
    ids = tokens(2, 24)
    with manyheads.use(model):
        cache = prefilled(model, strategy, ids)
        shuffled = copy.deepcopy(cache)
        for store in stores(shuffled):
            s = store.live
            order = torch.stack([torch.randperm(s.size) for _ in range(2 * s.keys.shape[1])]).view(2, -1, s.size)
            s.keep(order, torch.ones_like(order, dtype=torch.bool))
        for t in range(3):
            last = tokens(2, 1, seed=t)
            assert_close(step(model, last, shuffled), step(model, last, cache), _packed(strategy))


def rows_can_be_rearranged(model: Any, strategy: Any) -> None:
    """Beam search, expansion and selection act on all that is remembered: as if the rows had come so."""
    _, ids, mask = _rows("left")
    moves = {
        "reorder_cache": ([2, 0, 0], torch.tensor([2, 0, 0])),
        "batch_select_indices": ([1], torch.tensor([False, True, False])),
        "batch_repeat_interleave": ([0, 0, 1, 1, 2, 2], 2),
    }
    with manyheads.use(model):
        for method, (rows, argument) in moves.items():
            moved = prefilled(model, strategy, ids, attention_mask=mask)
            getattr(moved, method)(argument)
            direct = prefilled(model, strategy, ids[rows], attention_mask=mask[rows])
            more = mask[rows]
            for t in range(6):
                more = torch.cat([more, more.new_ones(len(rows), 1)], 1)
                last = tokens(3, 1, seed=t)[rows]
                assert_close(
                    step(model, last, moved, attention_mask=more),
                    step(model, last, direct, attention_mask=more),
                    _packed(strategy),
                )


def two_conversations(model: Any, strategy: Any) -> None:
    """Two caches in turn on one model: the second is bit-equal to a run by itself (D3)."""
    a, b = tokens(1, 20, seed=1), tokens(1, 14, seed=2)
    with manyheads.use(model):
        alone = prefilled(model, strategy, b)
        want = [step(model, tokens(1, n, seed=n), alone) for n in (1, 3, 1, 1)]
        first, second, got = prefilled(model, strategy, a), prefilled(model, strategy, b), []
        for n in (1, 3, 1, 1):
            step(model, tokens(1, n, seed=50 + n), first)
            got.append(step(model, tokens(1, n, seed=n), second))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    assert all(torch.equal(x.keys, y.keys) for x, y in zip(stores(second), stores(alone), strict=True))


def crops_or_refuses(model: Any, strategy: Any) -> None:
    """``crop``: afterwards as if the cropped tokens had never come, or a refusal in one line, and nothing changed."""
    ids = tokens(2, 24)
    with manyheads.use(model):
        cache = prefilled(model, strategy, ids)
        whole = all(s.live.index is None for s in stores(cache))
        step(model, tokens(2, 3, seed=3), cache)
        if not whole or any(s.live.index is not None or s.policy.window for s in stores(cache)):
            before = [s.keys.clone() for s in stores(cache)]
            try:
                cache.crop(-3)
            except manyheads.UserError as refusal:
                assert "cannot be cropped" in str(refusal)
            else:
                raise AssertionError("cropped what it cannot restore")
            assert all(torch.equal(s.keys, k) and s.seen == 27 for s, k in zip(stores(cache), before, strict=True))
            return
        cache.crop(-3)
        direct = prefilled(model, strategy, ids)
        for t in range(8):
            last = tokens(2, 1, seed=40 + t)
            assert_close(step(model, last, cache), step(model, last, direct))


def continues_where_it_was(model: Any, strategy: Any) -> None:
    """``generate`` again with the same cache: exactly the new tokens are fed, at the positions of an ordinary cache."""

    def run(cache: Any) -> tuple[list[list[int]], list[list[int]]]:
        fed, places = [], []

        def see(_module: Any, _args: Any, kwargs: Any) -> None:
            fed.append(kwargs["input_ids"][0].tolist())
            places.append(kwargs["position_ids"][0].tolist())

        handle = model.register_forward_pre_hook(see, with_kwargs=True)
        try:
            ids = tokens(1, 20)
            for _ in range(3):
                made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False,
                                      **cache_arguments(model, cache))  # fmt: skip
                fed[-2:] = [[-1]] * 2  # what it made may differ; how much is fed, and where, may not
                ids = torch.cat([made[:, :-1] * 0 + 5, made[:, -1:] * 0 + 6, tokens(1, 4, seed=8)], 1)
        finally:
            handle.remove()
        return [[len(x)] for x in fed], places

    from transformers import DynamicCache

    want = run(DynamicCache(config=model.config))
    with manyheads.use(model):
        assert run(new_cache(model, manyheads.parse(strategy))) == want
