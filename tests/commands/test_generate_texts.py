# SPDX-License-Identifier: Apache-2.0
"""The verb `generate` on a language model: replies of the model, marked where they differ, with what is held."""

import json

import pytest
import torch

import manyheads
from manyheads.cli import main
from manyheads.generate.texts import differs, pieces
from manyheads.integrations.transformers import new_cache, prefill
from manyheads.report import generate_texts
from manyheads.spec import parse
from tiny import chat
from tiny.compare import tiny

PROMPT = "On day 7 the miller of badokilu was seen near the river"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("chatty")
    tiny().save_pretrained(place)
    chat.tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["generate", *arguments])
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_replies_are_those_of_generate(cli, folder):
    """Of transformers' own loop, on the plain model and on a compressed cache; a template read twice is another."""
    model, reader = tiny(), chat.tokenizer()
    spec = "keydiff:budget=0.3"
    code, out, err = cli(
        "--model", folder, PROMPT, "--prompt", "Another one", "--strategies", f"full,{spec}", "--max-new-tokens", "9",
        "--json",
    )  # fmt: skip
    assert code == 0 and err == ""
    facts = json.loads(out)
    assert facts["chat"] and [prompt["prompt"] for prompt in facts["prompts"]] == [PROMPT, "Another one"]
    for prompt in facts["prompts"]:
        text = f"<user>\n{prompt['prompt']}</user>\n<assistant>\n"
        ids = torch.tensor([reader.encode(text, add_special_tokens=False)])
        how = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        plain = model.generate(ids, **how)[0, ids.shape[1] :]
        with manyheads.use(model):
            cache = new_cache(model, parse(spec))
            prefill(model, ids, cache)
            held = cache.bytes()
            small = model.generate(ids, past_key_values=cache, **how)[0, ids.shape[1] :]
        full, other = prompt["replies"]
        assert prompt["prompt_tokens"] == ids.shape[1] and (full["arm"], other["arm"]) == ("full", spec)
        assert full["text"] == reader.decode(plain, skip_special_tokens=True)
        assert other["text"] == reader.decode(small, skip_special_tokens=True)
        assert other["held_bytes"] == held and other["held_ratio"] == held / full["held_bytes"] < 0.5
        assert other["end_bytes"] > held and full["prompt_seconds"] > 0 < other["reply_seconds"]
        assert other["differs_at"] == differs(other["text"], full["text"]) and full["differs_at"] is None
    assert "no benchmark" in facts["timing"]


def test_samples_are_rows_and_what_draws_nothing_replies_once(cli, folder):
    code, out, _ = cli("--model", folder, PROMPT, "--strategy", "sampling:temperature=3", "--samples", "2", "--json")
    rows = json.loads(out)["prompts"]
    assert code == 0 and [[reply["seed"] for reply in row["replies"]] for row in rows] == [[None, 0], [None, 1]]
    assert rows[0]["replies"][0] == rows[1]["replies"][0]
    assert rows[0]["replies"][1]["text"] != rows[1]["replies"][1]["text"]
    assert "seed 1" in cli("--model", folder, PROMPT, "--strategy", "sampling", "--seed", "1")[1]


def test_what_writes_side_by_side_is_not_looked_at(cli, folder):
    code, _, err = cli("--model", folder, PROMPT, "--strategy", "lnd:top_k=5", "--lens", "heads")
    assert code and "writes several texts side by side" in err and "Traceback" not in err


def test_a_page_and_a_table(cli, folder, tmp_path):
    code, out, err = cli(
        "--model", folder, "<b>bold</b> words", "--strategies", "random", "--budget", "0.1", "--out", "a/r.html",
        "--max-new-tokens", "12", "--no-chat",
    )  # fmt: skip
    assert code == 0 and "random:budget=0.1" in out and "no benchmark" in out, err
    page = (tmp_path / "a" / "r.html").read_text()
    assert "&lt;b&gt;bold" in page and "<b>bold" not in page and "random:budget=0.1" in page and "no benchmark" in page
    assert "<script>" not in page


def test_the_default_is_auto_at_a_quarter(cli, folder):
    code, out, _ = cli("--model", folder, PROMPT, "--max-new-tokens", "2", "--json")
    assert code == 0
    assert [reply["arm"] for reply in json.loads(out)["prompts"][0]["replies"]] == ["full", "auto:budget=0.25"]


@pytest.mark.parametrize(
    ("one", "two", "place"),
    [("a b c", "a b c", None), ("a  b\nc", "a b c", None), ("a x c", "a b c", 1), ("a b", "a b c", 2), ("", "", None),
     ("a b c d", "a b", 2), ("", "a", 0), ("  a b", "a c", 1), (" ", "a", 0)],
)  # fmt: skip
def test_the_first_other_word(one, two, place):
    assert differs(one, two) == place
    assert "".join(pieces(one)) == one
    same, other = generate_texts._parted({"text": one, "differs_at": place})
    assert same + other == one and same.split() == (one.split() if place is None else two.split()[:place])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give a prompt"), (["x y", "--steps", "3"], "--steps is of images"), (["x"], "2 are the least"),
        (["x y", "--out", "x.png"], "--out x.html"), (["x y", "--strategies", "nosuch"], "nosuch"),
        (["x y", "--budget", "2.5"], "budget"), (["x y", "--max-new-tokens", "5000"], "reads 2048 tokens"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(cli, folder, options, said):
    plain = ["--no-chat"] if options == ["x"] else []
    code, out, err = cli("--model", folder, *options, *plain)
    lines = [line for line in err.strip().splitlines() if line.startswith("error")]
    assert code == 2 and out == "" and said in err and len(lines) == 1


def test_a_chat_template_that_is_not_there(cli, tmp_path):
    tiny().save_pretrained(tmp_path / "plain")
    chat.tokenizer(chat=False).save_pretrained(tmp_path / "plain")
    code, _, err = cli("--model", "plain", "x y z", "--chat")
    assert code == 2 and "no chat template; leave --chat away" in err
    code, out, err = cli("--model", "plain", "x y z", "--json", "--max-new-tokens", "2")
    assert code == 0 and json.loads(out)["chat"] is False


def test_options_of_texts_do_not_go_with_images(cli):
    code, _, err = cli("--model", "scenes", "apple", "--strategy", "sag", "--budget", "0.5")
    assert code == 2 and "--budget is of texts" in err


def test_seconds_are_those_of_the_clock(monkeypatch):
    """The clock is read before and after reading, and before and after writing: 3 and 7 seconds, not 3,000 or 10."""
    from manyheads.experiment.arms import Arm
    from manyheads.generate import texts

    times = iter([100.0, 103.0, 200.0, 207.0])
    monkeypatch.setattr(texts, "_now", lambda device: next(times))
    ((reply,),) = texts.run(
        tiny(), chat.tokenizer(), [Arm("full")], [PROMPT], max_new_tokens=2, chat=None,
        progress=lambda *said: None,
    )  # fmt: skip
    assert (reply.reading, reply.writing) == (3.0, 7.0)
    facts = texts.facts([[reply]], tiny())
    shown = generate_texts.table(facts["prompts"][0]).cells[0]
    assert [cell.text for cell in shown[4:6]] == ["3.00", "7.00"]


def test_lenses_look_on(cli, folder, tmp_path):
    """The replies are those without; each arm's figures are in the JSON, step by step, and pictures on the page."""
    arms = "full,ablate:heads=0.1,keydiff:budget=0.3"
    given = ["--model", folder, PROMPT, "--strategies", arms, "--max-new-tokens", "6", "--json"]
    plain = json.loads(cli(*given)[1])
    code, out, err = cli(*given, "--lens", "heads", "--out", "looked.html")
    assert code == 0 and err == ""
    facts = json.loads(out)
    model, reader = tiny(), chat.tokenizer()
    for one, other in zip(facts["prompts"][0]["replies"], plain["prompts"][0]["replies"], strict=True):
        assert one["text"] == other["text"] and "lenses" not in other
        steps = one["lenses"]["head_statistics"]["steps"]
        layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
        for name in ("entropy", "logit", "first", "last", "top"):
            shape = [len(steps[name]), len(steps[name][0]), len(steps[name][0][0])]
            assert shape[:2] == [layers, heads] and shape[2] >= one["tokens"], name
        assert "".join(one["words"][-one["tokens"] :]) == reader.decode(
            reader.encode(one["text"], add_special_tokens=False)
        )
    full, without, small = (r["lenses"]["head_statistics"] for r in facts["prompts"][0]["replies"])
    assert full["steps"]["entropy"] != without["steps"]["entropy"]
    assert small["steps"]["first"] != full["steps"]["first"]
    page = (tmp_path / "looked.html").read_text()
    assert page.count("what its heads did") == 3 and "entropy by head and step" in page
    assert "places that most heads attend to" in page


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        ("thinking_sparks", "does not only look on"), ("spans:mine=0-3", "leave mine= away"),
        ("nothing", "unknown lens"), ("gender_components", "does not only look on"),
    ],
)  # fmt: skip
def test_lenses_that_cannot_look_on(cli, folder, lens, message):
    code, _, err = cli("--model", folder, PROMPT, "--strategies", "full", "--lens", lens)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
