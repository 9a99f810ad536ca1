# SPDX-License-Identifier: Apache-2.0
"""Figures of the training tasks, recomputed from a decoder's logits one sequence at a time, and by a clock by hand."""

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from manyheads.data.texts import Text
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.mixers._mixer import SoftmaxMixer
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.tasks.training import _decoders, _training_task, mixer_cost, mixer_speed
from manyheads.tasks.training._bytes import Bytes, flat, split
from manyheads.tasks.training._decoders import check_causal, decoder_of, mixer_of
from manyheads.tasks.training._training_task import Training, at_once
from manyheads.tasks.training.associative_recall import AssociativeRecall
from manyheads.tasks.training.byte_gap import ByteGap
from manyheads.tasks.training.byte_lm import ByteLM
from manyheads.tasks.training.mixer_cost import MixerCost
from manyheads.tasks.training.mixer_speed import MixerSpeed
from manyheads.tasks.training.offset_scores import OffsetScores
from manyheads.tasks.training.planted_constant import PlantedConstant
from oracles.tasks import rows
from tolerance import nearly

from .conftest import MODEL, SOFTMAX, TEXT, Knows, context


def decoder(vocab, length, **changes):
    torch.manual_seed(1)
    config = DecoderConfig(vocab, **{**MODEL, "layers": 2, **changes}, length=length)
    model = Decoder(SOFTMAX.strategy, config).eval().requires_grad_(False)
    model.embed.weight.mul_(8)
    return model


def nats(model, ids):
    """Loss of each token of one sequence, from float64 logits."""
    logits = model(ids[None, :-1])[0][0].double()
    return [float(row.exp().sum().log() - row[token]) for row, token in zip(logits, ids[1:], strict=True)]


def close(found, want):
    return [row.value for row in found] == pytest.approx(want, abs=2e-5)


def test_gap_to_the_bytes_that_were_kept(texts):
    task = ByteGap(**{**TEXT, "samples": 3}, kept=700)
    run, model = context(texts), decoder(256, 32)
    found = list(task.rows(run, SOFTMAX, 7, model))
    data = flat(split(texts)["train"], 700, "training")[:700]
    starts = torch.linspace(0, 700 - 33, 3, dtype=torch.float64).long()
    own = np.mean([nats(model, data[start : start + 33].long()) for start in starts.tolist()])
    held = [row.value for row in found if row.metric == "token_nll"]
    assert close([row for row in found if row.metric == "gap"], [value - own for value in held]) and len(held) == 3
    drawn = torch.cat([task.batches(run, 1)(step)[0] for step in range(20)])
    starts = {bytes(row.tolist()) for row in drawn}
    assert all(bytes(data.tolist()).find(row) >= 0 for row in starts)
    wider = ByteGap(**{**TEXT, "samples": 3}, kept=70_000)  # control: other bytes are drawn
    assert any(bytes(data.tolist()).find(bytes(row.tolist())) < 0 for row in wider.batches(run, 1)(0)[0])


def test_held_out_loss_by_length_and_by_position(texts):
    task = ByteLM(**{**TEXT, "samples": 3}, times=(1, 4), judged=5, reach=2)
    run, model = context(texts), decoder(256, 32)
    found = list(task.rows(run, SOFTMAX, 7, model))
    ids, about = task._windows(run, 4)
    assert ids.shape == (3, 4 * 32 + 1)
    for times in (1, 4):
        mine = [row for row in found if row.metric == "token_nll" and row.at == {"times": times}]
        want = [np.mean(nats(model, window[-(times * 32 + 1) :])[-5:]) for window in ids]
        assert close(mine, want) and [row.sample for row in mine] == ["0", "1", "2"] and mine[0].about == about[0]
        assert {row.seed for row in mine} == {7}
    longer, about = task._windows(run, 2)
    for first, last in ((0, 32), (32, 64)):
        mine = [row for row in found if row.metric == "span_nll" and row.at == {"last": last}]
        assert close(mine, [np.mean(nats(model, window)[first:last]) for window in longer])
        assert mine[1].about == {"first": first, **about[1]}
    assert len(found) == 3 * 4
    every = list(ByteLM(**{**TEXT, "samples": 2}).rows(run, SOFTMAX, 0, model))  # without `judged` all of the length
    ids, _ = ByteLM(**{**TEXT, "samples": 2})._windows(run, 1)
    assert close(every, [np.mean(nats(model, window)) for window in ids])


def test_what_a_training_reads(texts):
    task, run = ByteLM(**TEXT, validating=6), context(texts)
    parts = split(texts)
    data = {part: "\n".join(t.content for t in some).encode() for part, some in parts.items()}
    ids, mask = task.batches(run, 3)(5)
    places = run.rng(training=3, step=5).integers(0, len(data["train"]) - 32, 4)
    assert mask is None and ids.tolist() == [list(data["train"][at : at + 33]) for at in places]
    assert not torch.equal(ids, task.batches(run, 4)(5)[0]) and not torch.equal(ids, task.batches(run, 3)(6)[0])
    model = decoder(256, 32)
    starts = np.linspace(0, len(data["validation"]) - 33, 6).astype(int)
    windows = [list(data["validation"][at : at + 33]) for at in starts]
    want = np.mean([nats(model, torch.tensor(window)) for window in windows])
    assert task.validation(run, model) == pytest.approx(want, abs=2e-5)
    far = ByteLM(**TEXT, times=(1, 3))
    starts = np.linspace(0, len(data["validation"]) - 96, 4).astype(int)
    assert far.calibrating(run).tolist() == [list(data["validation"][at : at + 96]) for at in starts]
    few = task._cut(run, "validation", len(data["validation"]) // 2, 9)
    assert few.shape == (2, len(data["validation"]) // 2)  # as many as stand beside each other


def test_the_least_text_that_serves():
    """Four trained lengths to train on, a window to tune by, and one to judge by, with the byte after each."""
    task = ByteLM(**{**TEXT, "length": 34, "samples": 1}, validating=1)

    def needs(train, validation, test):
        texts = [Text("x", "ab" * 1000)]
        run = context(texts)
        parts = {"train": train, "validation": validation, "test": test}
        run._kept["parts", "code"] = {name: [Text(name, "x" * size)] for name, size in parts.items()}
        return task.units(run)

    assert needs(4 * 34, 35, 35)
    for few in ((4 * 34 - 1, 35, 35), (4 * 34, 34, 35), (4 * 34, 35, 34)):
        with pytest.raises(ValueError, match="too short"):
            needs(*few)


def test_texts_are_parted_by_size_in_the_order_of_their_hashes():
    texts = [Text(f"{i}", f"{i:02d}" * 50) for i in range(40)]
    parts = split(texts)
    order = sorted(texts, key=lambda text: text.sha256)
    assert parts["test"] == order[::-1][:4] and parts["validation"] == order[::-1][4:6]
    assert parts["train"] == order[:34]
    assert flat(texts[:2], 1, "test").tolist() == list(b"00" * 50 + b"\n" + b"01" * 50)
    assert len(flat(texts[:1], 100, "test")) == 100
    with pytest.raises(ValueError, match="its test part has 100 bytes and needs 101"):
        flat(texts[:1], 101, "test")
    few = split(texts[:9])
    assert [t.name for t in few["test"][:2]] == ["0 (test)", "1 (test)"]
    assert [len(few[p][3].content) for p in ("test", "validation", "train")] == [10, 5, 85]
    assert "".join(few[p][3].content for p in ("test", "validation", "train")) == texts[3].content
    assert Bytes().decode(Bytes().encode("é")) == "é" and Bytes().encode("é") == [0xC3, 0xA9]


def test_values_recalled_are_counted_by_hand(texts):
    task, run = AssociativeRecall(**MODEL, length=24, samples=9, batch=3, pairs=4, times=(1, 2)), context(texts)
    whole = [row for times in (1, 2) for row in task._drawn(run, 9, times, part="test")[0]]

    class Sometimes(Knows):
        """Right at two places of three, and one less in every second row."""

        def __call__(self, ids):
            logits = super().__call__(ids)[0]
            logits[:, ::3] = logits[:, ::3].roll(1, -1)
            logits[::2, -1] = logits[::2, -1].roll(1, -1)
            return logits, None

    found = list(task.rows(run, SOFTMAX, 2, Sometimes(whole, task.vocab)))
    model = decoder(task.vocab, 24)
    for times in (1, 2):
        ids, judged = task._drawn(run, 9, times, part="test")
        assert ids.shape == (9, times * 24 + 1) and (judged.sum(1) == 4).all()
        want = []
        for row, where in zip(ids, judged, strict=True):
            even = any(torch.equal(row, other) for other in ids[::2])
            wrong = {t for t in range(times * 24) if t % 3 == 0 or (even and t == times * 24 - 1)}
            want.append(np.mean([float(t not in wrong) for t in range(times * 24) if where[t]]))
        mine = [row for row in found if row.at == {"times": times}]
        assert close(mine, want) and {row.seed for row in mine} == {2}
    assert len({row.value for row in found}) > 1
    ids, judged = task._drawn(run, 9, 1, part="tuning")
    want = np.mean(
        [x for row, where in zip(ids, judged, strict=True) for x, ok in zip(nats(model, row), where, strict=True) if ok]
    )
    assert task.validation(run, model) == pytest.approx(want, abs=2e-5)
    assert task.calibrating(run).shape == (4, 48)
    batch, mask = task.batches(run, 2)(3)
    assert torch.equal(batch, task._drawn(run, 3, 1, training=2, step=3)[0]) and mask.shape == (3, 24)
    assert set(task.training_fields()) >= {"pairs", "tokens", "samples"}
    with pytest.raises(ValueError, match="four pairs"):
        AssociativeRecall(pairs=3)


def test_planted_constants_are_completed_if_every_byte_is(texts):
    task, run = PlantedConstant(**{**TEXT, "length": 160}), context(texts)
    model = decoder(256, 160)
    contexts = task._contexts(run)
    size = contexts.inserter.answer_size
    planted = contexts.single(160 - contexts.inserter.question_size - size)
    found = list(task.rows(run, SOFTMAX, 1, model))
    for i, one in enumerate(planted):
        (question,) = one.questions
        whole = torch.tensor([*one.ids, *question.question, *question.answer])
        completed, cost = (row for row in found if row.sample == f"{i}")
        assert whole.shape == (160,) and completed.at == cost.at == {"depth": question.depth}
        best = model(whole[None, :-1])[0][0, -size:].argmax(-1)
        assert completed.value == float(best.tolist() == list(question.answer))
        assert cost.value == pytest.approx(np.mean(nats(model, whole)[-size:]), abs=2e-5)
        assert completed.about == cost.about == {"text": one.text, "overlaps": one.overlaps}

    class First:
        """Says all bytes of the answer but the last."""

        def __call__(self, ids):
            said = torch.stack(
                [torch.tensor([*c.ids, *c.questions[0].question, *c.questions[0].answer]) for c in planted]
            )
            said[:, -1] = 0
            return 30.0 * torch.nn.functional.one_hot(said[:, 1:], 256), None

    assert {row.value for row in task.rows(run, SOFTMAX, 0, First()) if row.metric == "completed"} == {0.0}


def test_scores_by_offset_are_means_over_pairs(texts):
    task, run = OffsetScores(**{**TEXT, "samples": 3}, offsets=(0, 1, 5)), context(texts)
    model = decoder(256, 32)
    ids, _ = task._windows(run, 1)
    found = list(task.rows(run, SOFTMAX, 1, model))
    seen = []
    for block in (module for module in model.modules() if isinstance(module, SoftmaxMixer)):
        block.register_forward_pre_hook(lambda mixer, args: seen.append((mixer, args[0])))
    model(ids[:, :-1])
    assert len(seen) == 2
    for n in range(3):
        by = {0: [], 1: [], 5: []}
        for mixer, x in seen:
            at = torch.arange(32)[None].expand(3, -1)
            q, k = mixer.queries_and_keys(x, at, torch.full((3,), 32))
            pairs = {d: [] for d in range(32)}
            for h in range(q.shape[1]):
                for i in range(32):
                    for j in range(i + 1):
                        pairs[i - j].append(float(q[n, h, i] @ k[n, h, j]) * mixer.scale)
            every = np.mean([x for some in pairs.values() for x in some])
            for offset, values in by.items():
                values.append(np.mean(pairs[offset]) - every)
        for offset, values in by.items():
            (row,) = [row for row in found if row.sample == f"{n}" and row.at == {"offset": offset}]
            assert row.value == pytest.approx(np.mean(values), abs=1e-5)
    blind = Decoder(Arm("x", "tnl_lightning").strategy, DecoderConfig(256, **MODEL, length=32)).eval()
    with pytest.raises(ValueError, match="no layer of softmax"), torch.no_grad():
        list(task.rows(run, SOFTMAX, 1, blind))


@pytest.fixture
def clock(monkeypatch):
    """A decoder's forward takes what its mixer costs, and turns the clock; arms as they were run."""
    made = SimpleNamespace(now=Fraction(0), calls=[])

    def now(run):
        return made.now

    for module in (mixer_cost, mixer_speed, _decoders):
        monkeypatch.setattr(module, "now", now)
    return made


class Costs(torch.nn.Module):
    """Takes a millisecond for each token it is fed and two for each that it has read, times its own factor."""

    def __init__(self, clock, name, factor):
        super().__init__()
        self.clock, self.name, self.factor = clock, name, factor
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, ids, state=None):
        read = 0 if state is None else state[0].nbytes // 10
        self.clock.calls.append((self.name, tuple(ids.shape), read))
        self.clock.now += Fraction(self.factor * (ids.numel() + 2 * read), 1000)  # exact, however late it is
        state = SimpleNamespace(nbytes=10 * (read + ids.shape[1])), SimpleNamespace(nbytes=0)
        return self.weight * torch.ones(*ids.shape, 4), [
            SimpleNamespace(nbytes=state[0].nbytes),
            SimpleNamespace(nbytes=4),
        ]


def test_bytes_and_milliseconds_of_a_token(clock, monkeypatch):
    arms = (SOFTMAX, Arm("twice", "softmax"), Arm("left", "softmax"))
    run = RunContext(Trainable(), arms)
    models = {"softmax": Costs(clock, "softmax", 1), "twice": Costs(clock, "twice", 2)}
    task = MixerCost(lengths=(16, 600), only=("softmax", "twice"), vocab=50)
    monkeypatch.setattr(MixerCost, "models", lambda self, run: models)
    found = rows(task, run)
    read = {16: 16, 600: 600}
    for length in (16, 600):
        for arm, factor in (("softmax", 1), ("twice", 2)):
            (held,) = [row for row in found if (row.metric, row.arm, row.at["length"]) == ("state", arm, length)]
            times = [row for row in found if (row.metric, row.arm, row.at["length"]) == ("decode", arm, length)]
            # What was read, and of twelve tokens decoded all; ten of them are timed.
            assert held.value == held.bytes == 10 * (read[length] + 12) + 4
            assert [row.value for row in times] == nearly([factor * (1 + 2 * (length + i)) for i in range(2, 12)])
    parts = [shape for name, shape, _ in clock.calls if name == "twice"]
    assert parts == [(1, 16)] + [(1, 1)] * 12 + [(1, 512), (1, 60)] + [(1, 1)] * 12
    turns = [name for name, shape, _ in clock.calls if shape == (1, 1)]
    assert turns[:4] == ["softmax", "twice", "twice", "softmax"]
    (unit,) = task.units(run)
    assert unit.cost == 0.5 * 600 * 2
    (unit,) = MixerCost(lengths=(16, 40, 600), only=("softmax", "twice")).units(run)
    assert unit.cost == 0.5 * 600 * 2  # of the longest


def test_microseconds_of_a_token_of_training(clock, monkeypatch):
    run = RunContext(Trainable(), (SOFTMAX, Arm("twice", "softmax")))
    models = {"softmax": Costs(clock, "softmax", 1), "twice": Costs(clock, "twice", 2)}
    threads, said = torch.get_num_threads(), []
    monkeypatch.setattr(torch, "set_num_threads", said.append)
    monkeypatch.setattr(MixerSpeed, "models", lambda self, run: models)
    task = MixerSpeed(length=8, times=(1, 4), tokens=64, rounds=3, vocab=50)
    found = rows(task, run)
    assert len(found) == 2 * 2 * 3 and said == [1, threads]
    for row in found:  # 64 tokens take 64 ms: a millisecond each
        assert row.value == nearly({"softmax": 1000.0, "twice": 2000.0}[row.arm])
    assert {row.sample for row in found} == {"0", "1", "2"} and {row.at["times"] for row in found} == {1, 4}
    assert {shape for _, shape, _ in clock.calls} == {(8, 8), (2, 32)} and len(clock.calls) == 2 * 2 * 5
    assert all(model.weight.grad is None for model in models.values())
    (unit,) = task.units(run)
    assert unit.cost == 5 * 2 * 2 * 64
    with pytest.raises(ValueError, match="do not part"):
        MixerSpeed(length=8, times=(1, 3), tokens=64)


def test_arms_without_a_decoder_of_their_own_are_not_timed():
    arms = (
        SOFTMAX,
        Arm("judged", "softmax", options={"weights_of": "softmax"}),
        Arm("muon", "softmax", options={"optimizer": "muon"}),
        Arm("b", "softmax"),
    )
    run = RunContext(Trainable(), arms)
    assert [arm.key for arm in MixerCost().measured(run)] == ["softmax", "b"]
    assert [arm.key for arm in MixerCost(only=("b",)).measured(run)] == ["b"]
    task = ByteLM(**TEXT)
    assert [arm.key for arm in task.trained_arms(run)] == ["softmax", "muon", "b"]
    assert [arm.key for arm in ByteLM(**TEXT, only=("b",)).trained_arms(run)] == ["b"]
    made = MixerCost(**MODEL, vocab=50, length=32, only=("b",)).models(run)
    assert set(made) == {"b"} and made["b"].config.vocab == 50 and made["b"].config.length == 32


def test_decoders_of_arms_are_alike(texts):
    """As many parameters as the baseline's, first weights by the seed, and no draw of the caller's is moved on."""
    run = RunContext(Trainable(), (SOFTMAX, Arm("mine")), data={"strategies": {"mine": SOFTMAX.strategy}})
    config = DecoderConfig(256, **MODEL, length=32)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (decoder_of(run, run.arms[i], config, 0, seed) for i, seed in ((0, 1), (1, 1), (0, 2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.parameters_held == Decoder(SOFTMAX.strategy, config).parameters_held
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embed.weight, other.embed.weight)
    assert abs(decoder_of(run, SOFTMAX, config, 30_000).parameters_held - 30_000) < 600
    assert mixer_of(run, run.arms[1]) is SOFTMAX.strategy


@pytest.mark.parametrize("where", ["next", "third", "last"])
def test_a_leak_from_one_place_is_found(where):
    """From the next token, from a third of the sequence, or from the last token to the last but one alone."""

    class Leaks(torch.nn.Module):
        config = SimpleNamespace(vocab=50)

        def forward(self, ids):
            x = ids.double()
            out = x.cumsum(1) / 7
            if where == "next":
                out[:, 0] += 1e-3 * x[:, 1]
            if where == "third":
                out[:, ids.shape[1] // 3 - 1] += 1e-3 * x[:, ids.shape[1] // 3]
            if where == "last":
                out[:, -2] += 1e-3 * x[:, -1]
            return out[..., None], None

    ids = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(0))
    model = Leaks().train()
    with pytest.raises(ValueError, match="mine is not causal"):
        check_causal(model, ids, "mine")
    where = "nowhere"
    for mode in (True, False):
        check_causal(model.train(mode), ids, "mine")
        assert model.training == mode


def test_what_is_told_of_a_training(texts):
    run = context(texts)
    run.seeds = (4, 5)
    task = ByteLM(**TEXT)
    losses = [10.0 - 0.1 * i for i in range(73)]
    model = SimpleNamespace(parameters_held=123)
    trained = SimpleNamespace(model=model, rate=3e-3, losses=losses, seconds=2.5, order="abc")
    training = SimpleNamespace(task=task, run=run, arm=SOFTMAX, tuned=lambda: {3e-3: 2.0, 1e-2: math.inf})
    told, *tuned = _training_task._training_rows(training, 4, trained)
    assert told.value == nearly(np.mean(losses[-7:])) and (told.metric, told.seed) == ("training_nll", 4)
    about = told.about
    assert (about["rate"], about["tokens"], about["parameters"], about["order"]) == (3e-3, 73 * 4 * 32, 123, "abc")
    curve = dict(about["curve"])
    assert len(curve) == 32 and min(curve) == 4 * 32 and max(curve) == 73 * 4 * 32
    assert all(loss == losses[tokens // 128 - 1] for tokens, loss in curve.items())
    assert [(row.at["rate"], row.value, row.about["diverged"]) for row in tuned] == [
        (3e-3, 2.0, False), (1e-2, math.log(256), True)
    ]  # fmt: skip
    assert len(list(_training_task._training_rows(training, 5, trained))) == 1  # rates are the first seed's
    short = SimpleNamespace(**{**vars(trained), "losses": [3.0, 2.0]})
    assert next(iter(_training_task._training_rows(training, 5, short))).value == 2.0
    other = SimpleNamespace(**{**vars(training), "task": ByteLM(**TEXT, tuned_by=task)})
    assert len(list(_training_task._training_rows(other, 4, trained))) == 1


def test_units_cost_what_they_train(texts):
    run = context(texts)
    run.seeds = (4, 5, 6)
    step = 8 * 4 * 32
    costs = [unit.cost for unit in ByteLM(**TEXT).units(run)]
    assert costs == [2 * step, step, step]  # both rates on the first seed, whose best is kept
    assert [unit.cost for unit in ByteLM(**TEXT, tune_steps=2).units(run)] == [2 * step / 4 + step, step, step]
    assert [unit.cost for unit in ByteLM(**{**TEXT, "rates": (1e-3,)}).units(run)] == [step] * 3
    assert [unit.cost for unit in ByteLM(**TEXT, tuned_by=ByteLM(**TEXT)).units(run)] == [step] * 3
    assert [unit.cost for unit in PlantedConstant(**{**TEXT, "length": 160}).units(run)] == [1.0] * 3
    units = ByteLM(**TEXT, trainings=2).units(run)
    assert [(unit.params["arm"], unit.params["seed"]) for unit in units] == [("softmax", 4), ("softmax", 5)]
    for wrong in ({"rates": ()}, {"rates": (1e-3, 0.0)}, {"steps": 0}, {"samples": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="give"):
            ByteLM(**{**TEXT, **wrong})
    assert (at_once(64), at_once(16384), at_once(20_000)) == (256, 1, 1)


def test_what_a_training_depends_on(texts):
    """Other settings, another seed, another run or another seed to tune by make another model."""
    run = context(texts)
    run.seeds = (4, 5)
    plain = Training(ByteLM(**TEXT), run, SOFTMAX)
    assert plain.settings(7)["first"] == 4 and plain.settings(7)["seed"] == 7 and plain.settings()["seed"] is None
    assert plain.settings()["optimizer"] == "adamw" and plain.settings()["spec"] == "softmax"
    other = Training(
        ByteLM(**{**TEXT, "steps": 9}, tuned_by=ByteLM(**TEXT)), run, Arm("m", "softmax", options={"optimizer": "muon"})
    )
    assert other.settings()["optimizer"] == "muon" and other.settings()["tuned_by"]["steps"] == TEXT["steps"]
    for name in (
        "vocab",
        "dim",
        "layers",
        "heads",
        "parameters",
        "length",
        "batch",
        "steps",
        "rates",
        "text",
        "validating",
    ):
        assert name in plain.settings()


def test_a_rate_that_diverges_later_gives_way_to_the_next_lower(texts, monkeypatch):
    from manyheads.training import Diverged

    tried, kept = [], []

    def train(self, seed, rate, steps):
        tried.append((seed, rate, steps))
        if rate > 1e-3:
            raise Diverged("NaN")
        return SimpleNamespace(rate=rate)

    monkeypatch.setattr(Training, "_train", train)
    monkeypatch.setattr(Training, "_found", lambda self, seed: None)
    monkeypatch.setattr(Training, "_keep", lambda self, seed, trained: kept.append((seed, trained.rate)))
    monkeypatch.setattr(Training, "tuned", lambda self: {1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0, 8e-3: 5.0, 5e-4: 9.0})
    training = Training(ByteLM(**TEXT), context(texts), SOFTMAX)
    assert training._fitted(9).rate == 1e-3 and kept == [(9, 1e-3)]
    assert tried == [(9, rate, 8) for rate in (4e-3, 2e-3, 1e-3)]
    monkeypatch.setattr(Training, "tuned", lambda self: {2e-3: 2.0})
    with pytest.raises(ValueError, match=r"diverges at every rate up to 0\.002"):
        training._fitted(9)
