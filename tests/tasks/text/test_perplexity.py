# SPDX-License-Identifier: Apache-2.0
"""Loss under pieces, streaming, repeated text and planted channels, against one plain forward."""

import pytest
import torch

from manyheads.errors import UserError
from manyheads.experiment import Arm, CausalLM, Experiment, run
from manyheads.models import load_default
from manyheads.tasks.text._contexts import PASSAGE
from manyheads.tasks.text.perplexity import Perplexity
from tiers import spread

LENGTH, TARGET = 64, 24


@pytest.fixture(scope="module")
def subject():
    return CausalLM("default", *load_default(dtype=torch.float32))


def losses(subject, folder, task, *arms):
    plan = Experiment(subject=subject, arms=arms, tasks=(task,)).at("cpu")
    found = {}
    for row in run(plan, folder).rows:
        found.setdefault(row.arm, []).append(row.value)
    return found


def plain(subject, task):
    """The same from one forward of the model over all tokens."""
    from manyheads.data.texts import corpus
    from manyheads.tasks.text._contexts import Contexts
    from manyheads.tasks.text._corpus import Corpus

    tokenizer = subject.tokenizer
    drawn = Contexts(Corpus(corpus("code"), tokenizer), tokenizer, task.samples, 0, task.repeat)
    ids = torch.stack([torch.tensor(ids) for ids, _, _ in drawn.plain("loss", LENGTH, task.samples, TARGET + 1)])
    assert ids.shape[1] == LENGTH + TARGET + 1
    with torch.no_grad():
        logits = subject.model(ids[:, :-1]).logits[:, -TARGET:].float()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, -TARGET:], reduction="none")
    return nats.mean(1).tolist()


@spread("options", [{}, {"piece": 5}, {"repeat": 0.76}, {"start": 32, "piece": 8}], 2, ids=str)
def test_the_full_cache_loses_nothing_and_a_small_one_does(subject, tmp_path, options):
    task = Perplexity(lengths=(LENGTH,), samples=2, target=TARGET, **options)
    found = losses(subject, tmp_path, task, Arm("small", "streaming_llm:schedule=step", 8))
    assert found["full"] == pytest.approx(plain(subject, task), abs=2e-4)
    assert found["small:budget=8"] != pytest.approx(found["full"], abs=2e-2)


def test_planted_channels_leave_the_model_and_break_plain_int4(subject, tmp_path):
    arms = (Arm("int4", "fireq:scaling=none,window_tokens=4"), Arm("fireq", "fireq:window_tokens=4"))
    found = {
        factor: losses(
            subject, tmp_path / str(factor),
            Perplexity(lengths=(LENGTH,), samples=2, target=TARGET, piece=8, outliers=factor), *arms,
        )
        for factor in (0.0, 256.0)
    }  # fmt: skip
    assert found[0.0]["full"] == found[256.0]["full"]
    harm = {
        arm: max(abs(a - b) for a, b in zip(found[256.0][arm], found[256.0]["full"], strict=True))
        for arm in ("int4", "fireq")
    }
    assert harm["int4"] > 3 * harm["fireq"]


@pytest.mark.parametrize("planted", [{"outliers": 3.0}, {"channels": 3.0}])
def test_a_factor_that_rounds_is_refused(subject, tmp_path, planted):
    with pytest.raises(UserError, match="changed what the model computes"):
        losses(subject, tmp_path, Perplexity(lengths=(LENGTH,), samples=1, **planted))


@pytest.mark.slow
def test_planted_inputs_leave_the_model_and_break_int4_weights(subject, tmp_path):
    """Beside that, only the arms that are named are measured."""
    whole = "activations=whole,group=128"
    arms = (Arm("rough", f"fireq.linear:smoothing=none,{whole}"), Arm("smooth", f"fireq.linear:{whole}"))
    found = {
        factor: losses(
            subject, tmp_path / str(factor),
            Perplexity(lengths=(LENGTH,), samples=2, target=TARGET, channels=factor, only=("full", "rough", "smooth")),
            *arms, Arm("small", "streaming_llm:schedule=step", 8),
        )
        for factor in (0.0, 64.0)
    }  # fmt: skip
    assert found[0.0]["full"] == found[64.0]["full"] and set(found[0.0]) == {"full", "rough", "smooth"}
    harm = {
        arm: max(abs(a - b) for a, b in zip(found[64.0][arm], found[0.0]["full"], strict=True))
        for arm in ("rough", "smooth")
    }
    assert harm["rough"] > 2 * harm["smooth"]


def test_keys_that_are_normed_cannot_be_planted():
    from manyheads.tasks.text._outliers import why_no_keys
    from oracles import models

    assert "normalises its keys" in why_no_keys(models.build("qwen3"))
    assert why_no_keys(models.build("llama")) is None


def test_repeated_text_holds_its_passage_over_and_over(subject):
    from manyheads.data.texts import corpus
    from manyheads.tasks.text._contexts import Contexts
    from manyheads.tasks.text._corpus import Corpus

    def most(repeat):
        """How often the most frequent stretch of half a passage stands in a context of 480 tokens."""
        tokenizer = subject.tokenizer
        contexts = Contexts(Corpus(corpus("code"), tokenizer), tokenizer, 2, 0, repeat)
        counts = []
        for ids, _, _ in contexts.plain("loss", 480, 2, 1):
            assert len(ids) == 481
            half = [tuple(ids[i : i + PASSAGE // 2].tolist()) for i in range(len(ids) - PASSAGE // 2)]
            counts.append(max(map(half.count, half)))
        assert all(len(context.ids) == 480 for context in contexts.single(480))
        return min(counts)

    assert most(0.6) >= 6
    assert most(0.0) <= 2
