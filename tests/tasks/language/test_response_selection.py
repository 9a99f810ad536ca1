# SPDX-License-Identifier: Apache-2.0
"""Response selection: dialogues of one's own, candidates, scores by hand, both kinds of encoders, what they cost."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from manyheads.data import files, support_dialogues
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.recipe import Sample
from manyheads.tasks.language import _selection, response_selection
from manyheads.tasks.language._dialogues import _others
from manyheads.tasks.language._selection import TextEncoder, context_tokens, reply_tokens
from manyheads.tasks.language.response_selection import Ranked, ResponseSelection, fewer
from manyheads.tasks.language.scoring_cost import ScoringCost
from oracles import tasks
from tiny.dialogues import messages, selection
from tolerance import SAME, is_close, is_far

__all__ = ["selection"]


def test_a_folder_of_ones_own(selection):
    parts = {part: {s.group for s in selection.samples(part)} for part in ("train", "validation", "test")}
    assert parts == {"train": {"ann", "bob", "cid"}, "validation": {"dan"}, "test": {"eve"}}
    found = {s.name: s for s in selection.samples("test")}
    assert set(found) == {f"eve {i}" for i in range(1, 5)}  # every message but the first is a reply
    assert found["eve 2"].inputs == tuple(messages("eve")[:2]) and found["eve 2"].target == messages("eve")[2]
    assert selection.context(found["eve 2"]) == "eve"


def test_a_file_to_predict_and_what_will_not_do(selection, tmp_path):
    file = tmp_path / "mine"
    file.write_text("i feel bad\nwhy\n\nthen rest\nso long\nthen rest\n")
    sample = selection.open(file)
    assert sample.inputs == ("i feel bad", "why") and sample.about["others"] == ("then rest", "so long")
    batch = selection.collate([sample])
    assert "right" not in batch
    torch.manual_seed(0)
    (said,) = selection.predict(selection.reference(8).eval(), batch)
    assert said.replies == ("then rest", "so long") and str(said) == said.replies[int(said.scores.argmax())]
    for text in ("only a context\n", "\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="an empty line"):
            selection.open(file)
    file.write_bytes(b"\xff")
    with pytest.raises(UserError, match="UTF-8"):
        selection.open(file)
    with pytest.raises(UserError, match="no dialogue"):
        ResponseSelection.read(tmp_path / "nowhere")
    with pytest.raises(UserError, match="batch=12"):
        dataclasses.replace(selection, batch=13).draw(np.random.default_rng(0), selection.samples("train"))


def test_other_replies_are_of_other_dialogues_and_words():
    rows = [Sample(f"{g} {i}", g, "test", ("hi",), text) for g in "abc" for i, text in enumerate(("Yes!", f"{g} two"))]
    others = _others(rows[0], rows, 3)  # of a: "Yes!" of b and c are the same words
    assert sorted(others) == ["b two", "c two"] and others == _others(rows[0], rows, 3)
    assert set(_others(rows[1], rows, 3)) == {"Yes!", "b two", "c two"} and len(_others(rows[1], rows, 2)) == 2


def test_a_batch_draws_replies_that_differ(selection):
    samples = selection.samples("train")
    twice = [*samples, *(dataclasses.replace(s, name=f"{s.name}+") for s in samples)]
    for seed in range(20):
        drawn = selection.draw(np.random.default_rng(seed), twice)
        assert len({s.target for s in drawn}) == len(drawn) == 3
    batch = selection.collate(drawn)
    assert batch["candidates"].tolist() == [[0, 1, 2]] * 3 and batch["offered"].all()
    assert [batch["texts"][0][i] for i in batch["right"].tolist()] == [s.target for s in drawn]


def test_a_context_is_cut_in_front_and_a_reply_behind(selection):
    known = _selection.tokens("")
    read = [known.convert_ids_to_tokens(ids.tolist()) for ids in (
        context_tokens("", ("why is that", "my day"), 32), context_tokens("", ("why is that", "my day"), 5),
        reply_tokens("", "then rest now dear", 8), reply_tokens("", "then rest now dear", 4),
    )]  # fmt: skip
    assert [" ".join(one) for one in read] == [
        "[CLS] why is that [SEP] my day [SEP]", "[CLS] [SEP] my day [SEP]", "[CLS] then rest now dear [SEP]",
        "[CLS] then rest [SEP]",
    ]  # fmt: skip


def test_scores_are_those_by_hand(selection):
    sample = Sample("x", "x", "test", ("hi",), "b")
    said = Ranked(("a", "b", "c"), torch.tensor([1.0, 2.0, 3.0]))
    scored = selection.score(sample, said)
    assert said.place("b") == 2 and scored["mrr"] == 0.5 and scored["recall"] == 0
    assert scored["nll"] == pytest.approx(np.log(1 + np.e + np.exp(-1)), rel=1e-6)
    best = selection.score(sample, Ranked(("a", "b"), torch.tensor([1.0, 2.0])))
    assert best["recall"] == best["mrr"] == 1
    tied = selection.score(sample, Ranked(("a", "b", "c"), torch.zeros(3)))  # who says nothing is not right
    assert tied["recall"] == 0 and tied["mrr"] == 1 / 3
    assert selection.score(sample, Ranked(("a",), torch.zeros(1)))["mrr"] == 1 / 2  # not among them
    assert {m.name: m.floor for m in selection.stated}["recall"] == 1 / 3


def test_a_cross_encoder_reads_each_pair_as_one_text(selection):
    """Padding between the two texts changes nothing: the pair alone, without any, scores the same in plain BERT."""
    torch.manual_seed(0)
    model = selection.reference(8, "cross_encoder").eval()
    torch.nn.init.normal_(model.encoder.down.weight)
    batch = selection.collate(selection.judged("test"))
    with torch.no_grad():
        found = model(batch)
        for b in range(len(found)):
            for c in range(found.shape[1]):
                first = batch["inputs"][b][batch["mask"][b]]
                second = batch["replies"][batch["candidates"][b, c]][batch["reply_mask"][batch["candidates"][b, c]]]
                kinds = torch.cat((torch.zeros(len(first)), torch.ones(len(second) - 1))).long()
                both = torch.cat((first, second[1:]))[None]
                state = model.encoder.inside(input_ids=both, token_type_ids=kinds[None]).last_hidden_state
                state = state + model.encoder.down(torch.nn.functional.gelu(model.encoder.up(state)))
                assert is_close(model.score(state[0, 0])[0], found[b, c], SAME)
        assert is_far(model({**batch, "mask": torch.ones_like(batch["mask"])}), found, SAME)


def test_a_cross_encoder_is_trained_with_fewer(selection):
    batch = {
        "candidates": torch.arange(4).expand(3, 4), "offered": torch.ones(3, 4, dtype=torch.bool),
        "right": torch.tensor([0, 2, 3]),
    }  # fmt: skip
    found = fewer(batch, 2)
    assert found["candidates"].tolist() == [[0, 1, 2], [2, 3, 0], [3, 0, 1]] and found["right"].tolist() == [0] * 3
    assert fewer(batch, 15)["candidates"].shape == (3, 4)
    task = dataclasses.replace(selection, negatives=1)
    model = task.reference(8, "cross_encoder").eval()
    drawn = task.collate(task.draw(np.random.default_rng(0), task.samples("train")))
    scores = model(drawn).detach()
    want = torch.stack([scores[i, [i, (i + 1) % 3]].log_softmax(0)[0] for i in range(3)]).mean()
    assert is_close(task.loss(model, drawn), -want, SAME)


def test_two_encoders_where_they_are_not_tied(selection):
    torch.manual_seed(0)
    tied, apart = (dataclasses.replace(selection, tied=tied).reference(8).eval() for tied in (True, False))
    assert tied.second is None and not any(name.startswith("second") for name in tied.state_dict())
    batch = selection.collate(selection.judged("test"))
    with torch.no_grad():
        apart.encoder.inside.embeddings.word_embeddings.weight.zero_()  # replies are read by the other one
        before = apart.replies(batch["replies"], batch["reply_mask"])
        apart.second.inside.embeddings.word_embeddings.weight.zero_()
        assert is_far(apart.replies(batch["replies"], batch["reply_mask"]), before, SAME)


def test_published_weights_are_the_encoders_to_the_bit(selection, monkeypatch):
    found = BertModel(
        BertConfig(vocab_size=len(_selection.tokens("")), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=64)
    )  # fmt: skip
    monkeypatch.setattr(_selection, "published", lambda name: found)
    own = dataclasses.replace(selection, start="published").text_encoder(8)
    want = found.state_dict()
    assert all(torch.equal(x, want[name]) for name, x in own.inside.state_dict().items())
    random = selection.text_encoder(8)  # auto: its sizes are not MiniLM's
    assert not torch.equal(random.inside.state_dict()["embeddings.word_embeddings.weight"], want[
        "embeddings.word_embeddings.weight"
    ])  # fmt: skip
    ids, mask = torch.tensor([[2, 5, 6, 3]]), torch.ones(1, 4, dtype=torch.bool)
    own.eval(), found.eval()
    taken = dataclasses.replace(selection, start="published", layers=2).text_encoder(8).eval()
    assert is_close(taken(ids, mask), found(ids).last_hidden_state, SAME)  # what is behind adds nothing yet
    assert is_far(own(ids, mask), found(ids).last_hidden_state, SAME)
    with pytest.raises(UserError, match="another shape"):
        dataclasses.replace(selection, start="published", layers=3).text_encoder(8)


def test_the_lowest_layers_stand_still():
    torch.manual_seed(0)
    made = TextEncoder(16, 2, 2, 0.5, 8, 20, still=1).train()
    ids, mask = torch.randint(20, (3, 5)), torch.ones(3, 5, dtype=torch.bool)
    made(ids, mask).sum().backward()
    learned = {name for name, p in made.named_parameters() if p.grad is not None}
    assert learned and all(name.startswith(("inside.encoder.layer.1.", "up.", "down.")) for name in learned)
    assert not made.inside.encoder.layer[0].training and made.inside.encoder.layer[1].training
    free = TextEncoder(16, 2, 2, 0.5, 8, 20)
    free(ids, mask).sum().backward()
    assert free.inside.embeddings.word_embeddings.weight.grad is not None and free.inside.embeddings.training


def test_random_weights_give_states_of_a_moderate_length():
    torch.manual_seed(0)
    made = TextEncoder(64, 1, 2, 0.0, 8, 20)
    states = made(torch.randint(20, (3, 5)), torch.ones(3, 5, dtype=torch.bool))
    assert states.norm(dim=-1).sub(64**0.25).abs().max() < 1e-3


def test_texts_are_matched_by_words_and_meaning(selection, monkeypatch):
    samples = selection.judged("test")
    said = selection.matched(samples, "words")
    for one, sample in zip(said, samples, strict=True):
        own = set(" ".join(sample.inputs).split())
        shared = [bool(own & set(text.split())) for text in one.replies]
        assert [float(x) > 0 for x in one.scores] == shared and sample.target in one.replies
    vectors = {}

    def embedded(model, tokenizer, texts):
        for text in texts:
            vectors.setdefault(text, torch.nn.functional.normalize(torch.randn(4), dim=0))
        return torch.stack([vectors[text] for text in texts])

    monkeypatch.setattr(response_selection, "published", lambda name: None)
    monkeypatch.setattr(response_selection, "embedded_texts", embedded)
    for one, sample in zip(selection.matched(samples, "meaning"), samples, strict=True):
        want = [vectors[" ".join(sample.inputs)] @ vectors[text] for text in one.replies]
        assert is_close(one.scores, torch.stack(want), SAME)


def test_dialogues_are_put_together_from_their_turns(monkeypatch):
    lines = (
        "1.0 0 0 Hello  EOS 1.0 1 1 [Questions] How are you? EOS 1.0 1 2 [Other] Well?",
        "0.0 1 1 [Questions] How are you? EOS 0.0 1 2 [Other] Well? EOS 1.0 0 3 Bad EOS 1.0 1 4 [Other] Why [so]?",
        "1.0 1 0 [Other] Hi EOS 1.0 0 1 Hi EOS 1.0 1 2 [Other] Good EOS",
    )
    monkeypatch.setattr(files, "text", lambda name: "\n".join(lines))
    found = support_dialogues.dialogues(2, "esconv-dev")
    assert [[one["content"] for one in turns] for turns in found] == [
        ["Hello", "How are you? Well?", "Bad", "Why [so]?"], ["Hi", "Good"],  # the first of them is the user's
    ]  # fmt: skip
    assert [one["role"] for one in found[0]] == ["user", "assistant"] * 2


def test_operations_by_the_number_of_candidates(selection, monkeypatch):
    """What each candidate adds: products of one vector, of m vectors, or a pair of texts anew."""
    arms = (
        Arm("bi", options={"reference": "bi_encoder"}), Arm("poly", "polyencoder:m=4"),
        Arm("cross", options={"reference": "cross_encoder"}),
    )  # fmt: skip
    task = ScoringCost(dim=16, layers=1, heads=2, candidates=(1, 11), contexts=2)
    two = dataclasses.replace(selection, start="random", samples_judged=2)
    monkeypatch.setattr(ScoringCost, "selection", two)
    rows = tasks.rows(task, tasks.context(*arms))
    few, many = ({a.name: tasks.values(rows, "operations", a.key, candidates=n) for a in arms} for n in (1, 11))
    added = {name: (many[name] - few[name]) * 1e9 / 10 for name in few}
    assert added["bi"] == pytest.approx([2 * 16] * 2) and added["poly"] == pytest.approx([4 * 2 * 16] * 2)
    assert many["cross"] == pytest.approx(11 * few["cross"]) and (few["cross"] > few["bi"]).all()
    codes = (few["poly"] - few["bi"]) * 1e9 - 3 * 2 * 16  # codes with tokens, and their sums
    lengths = [len(context_tokens("", s.inputs, 24)) for s in task.selection.judged("test")]
    fewer_units = 2 * 4 * 16  # two of the feed-forward part, for as many parameters as the codes have
    assert codes == pytest.approx([n * (4 * 4 * 16 - fewer_units) for n in lengths])
    assert len(tasks.values(rows, "reading", "bi")) == 2
    assert "GPU" in ScoringCost(timed=True).unsupported_reason(tasks.context(*arms))


@pytest.mark.parametrize("fields", [
    {"candidates": 1}, {"negatives": 0}, {"batch": 1}, {"reply_tokens": 2}, {"context_tokens": 500}, {"still": 7},
])  # fmt: skip
def test_what_cannot_be_is_refused(fields):
    with pytest.raises(UserError, match=r"candidates|tokens|layers"):
        ResponseSelection(**fields)
