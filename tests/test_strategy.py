# SPDX-License-Identifier: Apache-2.0
"""A strategy is a frozen dataclass and one line of text; either gives the other back."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

import manyheads
from manyheads import UserError, parse, spec
from manyheads.causal_lens import CausalLens
from manyheads.conditioning import InsertedBlocks, SourceCondition
from manyheads.strategy import (
    Attention,
    AttentionCompute,
    AttentionEdit,
    AttentionPatch,
    AttentionWatch,
    Cache,
    DenoiserModule,
    DenoiserPrediction,
    Mixer,
    Residual,
    Strategy,
)  # fmt: skip
from manyheads.unlearning import Unlearning
from manyheads.writing import DecodingLoop, TokenChoice, Watermark

SLUGS = ("full", "random", "streaming_llm", "snapkv", "keydiff", "hashevict")

SPECS = [
    *SLUGS, "random:seed=3", "keydiff:budget=64", "keydiff:schedule=8", "keydiff:schedule=chunk,layers=0+1+2+7",
    "hashevict:budget=0.25,probe=key,num_bits=8,num_global=2", "snapkv:budget=0.1,window_size=16,kernel_size=5",
    "streaming_llm:sinks=0",
]  # fmt: skip


@pytest.mark.parametrize("text", SPECS)
def test_round_trip(text):
    strategy = parse(text)
    assert parse(strategy.spec) == strategy and hash(parse(strategy.spec)) == hash(strategy)
    given_ = {p.partition("=")[0] for p in text.partition(":")[2].split(",") if p}
    assert given_ <= {p.partition("=")[0] for p in strategy.spec.partition(":")[2].split(",")}
    assert parse(strategy) is strategy


@given(
    slug=st.sampled_from(SLUGS[1:]), budget=st.one_of(st.integers(50, 10**6), st.floats(1e-6, 1.0)),
    layers=st.one_of(st.none(), st.lists(st.integers(0, 99), min_size=1, max_size=5).map(tuple)),
    recent=st.integers(0, 9),
)  # fmt: skip
def test_round_trip_of_any_fields(slug, budget, layers, recent):
    cls = type(parse(slug))
    strategy = cls(budget=budget, layers=layers, recent=recent)
    again = parse(strategy.spec)
    assert again == strategy and type(again.budget) is type(strategy.budget)


def test_a_spec_taken_apart():
    """One grammar for a spec, a spec as a value, a list, and strategies that are used together."""
    read = spec.read(" graphkv( base = snapkv(window_size=16,kernel_size=5), budget=0.5 ) ")
    assert read == spec.Spec("graphkv", {"base": "snapkv(window_size=16,kernel_size=5)", "budget": "0.5"})
    assert read.nested == "graphkv(base=snapkv(window_size=16,kernel_size=5),budget=0.5)"
    assert spec.read(read.nested) == read and parse(read.nested) == parse(read.nested.replace("(", ":", 1)[:-1])
    assert spec.read("full").nested == "full" and spec.read("full:") == spec.read("full()")
    assert spec.split_together("sag:scale=0.5 + pab") == ["sag:scale=0.5", "pab"]
    with pytest.raises(UserError, match="on either side"):
        spec.split_together("sag + ")


@pytest.mark.parametrize("text", ["", "a-b", "3-1", "1-", "-2", "1+", "1,2"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="are no numbers"):
        spec.numbers(text)


def test_spaces_and_ranges():
    assert spec.numbers("0-3 + 7") == (0, 1, 2, 3, 7)
    strategy = parse(" keydiff : budget = 0.5 , layers = 0-3+7 ")
    assert strategy.budget == 0.5 and strategy.layers == (0, 1, 2, 3, 7)
    assert parse("keydiff:") == parse("keydiff") == type(strategy)()


def test_parts_of_a_tuple_are_joined_by_plus():
    assert parse("active_dormant:domains=code+prose").domains == ("code", "prose")
    assert parse("token_maps:tokens=2+3").tokens == (2, 3)
    assert parse("t5_attention_alignment:spread=.5").spread == (0.5,)
    assert parse("ablate:heads=3.1+4.2").heads == ("3.1", "4.2")  # read by a check of its own


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snapkw", "snapkv"),
        ("hash-evict:budget=0.5", "hashevict"),
        ("snapkv:windowsize=8", "snapkv has no field 'windowsize'; did you mean 'window_size'"),
        ("keydiff:quux=1", "keydiff has no field 'quux'; it has budget, layers"),
        ("keydiff:budget", "write 'budget' as field=value"),
        ("keydiff:budget=1,budget=2", "'budget' is given twice"),
        ("keydiff:budget=0", "keydiff: budget=0: budget must be above 0"),
        ("keydiff:budget=1.5", "a fractional budget is at most 1.0"),
        ("keydiff:budget=many", "not 'many'"),
        ("hashevict:num_bits=8.5", "hashevict: num_bits=8.5: .*integer"),
        ("hashevict:probe=both", "hashevict: probe=both: .*'query' or 'key'"),
        ("keydiff:layers=a-b", "keydiff: layers=a-b"),
        ("keydiff:schedule=often", "schedule is prefill, turn, chunk, step or a number"),
        ("keydiff:schedule=0", "schedule is prefill"),
        ("keydiff:sinks=-1", "cannot be negative"),
        ("t5_attention_alignment:taus=.5+x", "taus=.5.x: .*number"),
        ("keydiff:budget=4,sinks=3,recent=2", "a budget of 4 slots cannot hold its 5 protected tokens"),
        ("", "."),
        (":budget=1", "."),
    ],
)
def test_refusals_are_one_line_that_helps(text, says):
    with pytest.raises(UserError, match=says) as refusal:
        parse(text)
    assert "\n" not in str(refusal.value) and refusal.value.__cause__ is None


@pytest.mark.parametrize("slug", SLUGS)
def test_strategies_are_frozen_and_say_what_their_fields_are(slug):
    strategy = parse(slug)
    assert strategy.slug == slug and isinstance(strategy, Cache)
    assert not isinstance(strategy, (Attention, Residual, Mixer))
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.budget = 1
    assert all(f.metadata.get("help") for f in dataclasses.fields(strategy))
    with pytest.raises(TypeError):
        type(strategy)(0.5)


KINDS = {
    AttentionEdit: "edit", AttentionCompute: "attend", AttentionWatch: "watch", AttentionPatch: "patch", Cache: "store",
    CausalLens: "locate", Residual: "residual", DenoiserModule: "around_module", DenoiserPrediction: "denoise",
    Mixer: "build", TokenChoice: "choose", DecodingLoop: "write", Watermark: "read",
    Unlearning: "terms", SourceCondition: "condition", InsertedBlocks: "blocks",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_one_method_that_must_be_there(kind):
    """A class that says it is of a kind and lacks the method cannot be made: nothing is silently a no-op."""
    assert kind.__abstractmethods__ == {KINDS[kind]}
    assert not any(hasattr(Strategy, method) for method in KINDS.values())

    class Lacks(kind):
        pass

    with pytest.raises(TypeError, match=KINDS[kind]):
        Lacks()
    has = type("Has", (Lacks,), {KINDS[kind]: lambda *_: None})()
    assert [k for k in KINDS if isinstance(has, k)] == [kind]


def test_kinds_add_up():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Both(AttentionWatch, AttentionPatch):
        gain: float = 2.0

        def watch(self, call, out):
            pass

        def patch(self, call, out):
            return self.gain * out

    assert isinstance(Both(), Attention) and [f.name for f in dataclasses.fields(Both)] == ["layers", "gain"]
    assert Both(gain=3.0, layers=(1,)).spec == "test_strategy:layers=1,gain=3.0"


def test_a_cache_without_a_budget():
    """What code asks of every cache has a neutral answer where a strategy says nothing."""

    class Plain(Cache):
        def store(self, site):
            raise AssertionError

    plain = Plain()
    assert (plain.budget, plain.schedule, plain.record) == (1.0, "prefill", 0) and plain.check(0) is None
    assert not any((plain.has_budget, plain.dense_prefill, plain.exact_chunks, plain.needs_queries, plain.cross_layer,
                    plain.accumulated_attention))  # fmt: skip
    assert parse("keydiff:budget=8").has_budget and not parse("full").has_budget
    assert parse("adakv:base=h2o").accumulated_attention and parse("d2o").record > 10**6


def test_use_takes_specs_and_strategies():
    port = manyheads.use(None, "keydiff:budget=8", parse("full"))
    assert [s.spec for s in port.strategies] == ["keydiff:budget=8", "full"]
    with pytest.raises(UserError):
        manyheads.use(None, "keydif:budget=8")
