# SPDX-License-Identifier: Apache-2.0
"""What rows mean, place by place where a pipeline may say it, with pipelines and calls that are made up."""

from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from diffusers.pipelines.pag.pag_utils import PAGMixin  # noqa: E402

from manyheads.integrations import batch_rows  # noqa: E402
from manyheads.integrations.batch_rows import (  # noqa: E402
    PromptRows,
    guidance_of,
    of_one_sample,
    rescales,
    rows_of,
    tensors_of,
)  # fmt: skip

A, B, C = (torch.full((1, 3), float(i)) for i in (1, 2, 3))


class Own:
    def __call__(self, x):
        first, second = x.chunk(2)
        return first, second


class Says:
    def __call__(self, x):
        noise_pred_uncond, noise_pred_text = x.chunk(2)
        return noise_pred_uncond, noise_pred_text


class Pag(PAGMixin):
    do_perturbed_attention_guidance = True

    def __call__(self, x):
        return x


def prompts(**named):
    made = PromptRows()
    made.add(named)
    return made


def test_every_tensor_in_its_order():
    x = [torch.tensor(float(i)) for i in range(6)]
    given = {"a": x[0], "b": [x[1], {"c": (x[2], None, "x")}], "d": 5, "e": {"f": x[3]}, "g": (x[4], [x[5]])}
    assert list(tensors_of(given)) == x
    assert list(tensors_of(None)) == [] and list(tensors_of(x[0])) == [x[0]]


def test_the_name_of_a_context_comes_first():
    """Before a skipped layer, that before the order of PAG, that before embeddings, and they before the code."""
    pair, given = prompts(text=A, negative_text=B), {"x": torch.cat([A, B]), "skip_layers": [1]}
    assert rows_of(Says(), "pred_cond_skip", given, True, pair) == ("cond_skip",)
    assert rows_of(Says(), "uncond", given, True, pair) == ("uncond",)
    assert rows_of(Says(), "cond_uncond", given, True, pair) == ("cond_skip",)
    assert rows_of(Says(), None, {**given, "skip_layers": None}, True, pair) == ("cond", "uncond")
    six = {"x": torch.zeros(6, 3)}
    for guided, order in ((True, ("uncond", "cond", "perturbed")), (False, ("cond", "perturbed"))):
        assert rows_of(Pag(), None, six, guided, pair) == order
    assert rows_of(Pag(), None, {"x": torch.zeros(4, 3)}, True, pair) == ("unknown",)
    assert rows_of(Pag(), None, {"x": torch.zeros(3, 3)}, False, pair) == ("unknown",)
    assert rows_of(Pag(), None, {"x": torch.cat([A, B])}, None, pair) == ("cond", "uncond")  # outside of its call
    off = Pag()
    off.do_perturbed_attention_guidance = False
    assert rows_of(off, None, {"x": torch.cat([B, A])}, True, pair) == ("uncond", "cond")
    assert rows_of(Says(), None, {"x": torch.cat([A, B])}, False, pair) == ("all",)
    # The code says it where embeddings do not; where they speak against it, nothing is known.
    assert rows_of(Says(), None, {"x": torch.zeros(2, 3)}, True, pair) == ("uncond", "cond")
    assert rows_of(Says(), None, {"x": torch.zeros(3, 3)}, True, pair) == ("unknown",)
    assert rows_of(Own(), None, {"x": torch.zeros(2, 3)}, True, pair) == ("unknown",)
    assert rows_of(Own(), None, {"x": torch.zeros(2, 3)}, None, pair) == ("all",)
    same = prompts(text=A, negative_text=A)  # nothing to tell them by: all orders fit, and the code decides
    assert rows_of(Says(), None, {"x": torch.cat([A, A])}, True, same) == ("uncond", "cond")
    assert rows_of(Own(), None, {"x": torch.cat([A, A])}, True, same) == ("unknown",)
    only = prompts(text=torch.cat([A, B]), negative_text=torch.cat([A, C]))
    # Rows B, A: conditional both, or the second not; and the code says a third thing.
    assert rows_of(Says(), None, {"x": torch.cat([B, A])}, True, only) == ("unknown",)
    both = prompts(text=torch.cat([A, B]), negative_text=torch.cat([A, A]))
    # Rows A, A: conditional, unconditional, or one of each, in either order.
    assert rows_of(Says(), None, {"x": torch.cat([A, A])}, True, both) == ("uncond", "cond")
    assert rows_of(None, None, {"x": torch.cat([A, A])}, None, both) == ("all",)
    assert rows_of(Says(), None, {"scalar": torch.tensor(1.0)}, True, PromptRows()) == ("unknown",)  # one row


def test_rows_of_the_timestep_are_no_embeddings():
    pair = prompts(text=torch.tensor([1.0]), negative_text=torch.tensor([2.0]))
    assert pair.fitting({"timestep": torch.tensor([1.0])}) == set()
    assert pair.fitting({"guidance": torch.tensor([1.0])}) == {("cond",)}
    assert pair.fitting({"guidance": torch.tensor(1.0)}) == set() and PromptRows().fitting({"x": A}) == set()


def test_what_every_argument_allows_counts():
    pair = prompts(text=A, negative_text=B, pooled=torch.ones(1, 2), negative_pooled=torch.ones(1, 2))
    given = {"x": torch.cat([B, A]), "p": torch.ones(2, 2)}
    assert pair.fitting({"p": given["p"]}) == {("uncond", "cond"), ("cond", "uncond"), ("cond",), ("uncond",)}
    assert pair.fitting(given) == {("uncond", "cond")}
    assert pair.fitting({"x": torch.cat([B, A, C])}) == set() and pair.fitting({"x": torch.zeros(2, 9)}) == set()
    assert pair.fitting({"x": torch.cat([A, A, B])}) == set()  # three rows are no two equal parts
    assert pair.fitting({"x": torch.cat([A, A, B, B])}) == {("cond", "uncond")}
    half = prompts(text=A.half(), negative_text=B.half())
    assert half.fitting({"x": torch.cat([A, B])}) == {("cond", "uncond")}  # in the precision of the denoiser


def test_prompts_are_taken_in_pairs_and_the_latest_sixteen_are_held():
    made = PromptRows()
    made.add({"text": A, "negative_text": None, "negative_other": B, "other": "x", "negative_lone": C})
    assert made._pairs == []
    made.add({"text": A, "negative_text": B, "plain": C})
    assert len(made._pairs) == 1 and made._pairs[0] == (A, B)
    x = torch.cat([A, B])
    assert made.fitting({"x": x}) == {("cond", "uncond")} and made._found[0][0] is x
    made.add({"text": B, "negative_text": A})  # another pair: what was found is found anew
    assert made._found == [] and len(made.fitting({"x": x})) == 4
    made._found = [(x, {("told",)})]
    assert made.fitting({"x": x}) == {("told",)}
    for i in range(40):
        made.add({"text": torch.full((1, 3), 10.0 + i), "negative_text": torch.full((1, 3), 100.0 + i)})
    assert len(made._pairs) == 16 and float(made._pairs[0][0][0, 0]) == 10 + 24
    for i in range(40):
        made.fitting({"x": torch.full((1, 3), 10.0 + i)})
    assert len(made._found) == 16
    made.clear()
    assert (made._pairs, made._found) == ([], [])


def encode_two(self, one, two):
    if one is None:
        return two
    return (one if two is None else two), one  # the first has no name of its own


def encode(self, prompt_embeds, negative_prompt_embeds, pooled=None):
    if pooled is None:
        return prompt_embeds, negative_prompt_embeds
    prompt_embeds, negative_prompt_embeds = negative_prompt_embeds, prompt_embeds
    return prompt_embeds, negative_prompt_embeds, pooled


def encode_one(self, negative_x, x):
    return x if x is not None else negative_x


def test_returned_embeddings_have_the_names_of_the_return():
    for result, pairs in (((A, B), [(A, B)]), ((A, B, C), [(A, B)]), ((A,), []), (A, [])):
        made = PromptRows()
        made.add_returned(encode, result)
        assert made._pairs == pairs
    assert batch_rows._returned(encode, 2) == ("prompt_embeds", "negative_prompt_embeds")
    assert batch_rows._returned(encode, 3) == ("prompt_embeds", "negative_prompt_embeds", "pooled")
    assert batch_rows._returned(encode, 1) == () and batch_rows._returned(len, 1) == ()
    assert batch_rows._returned(encode_two, 2) == ("one", "one") and batch_rows._returned(encode_two, 1) == ("two",)
    assert batch_rows._returned(encode_one, 1) == ("x",)  # of a choice the first


def says(statement):
    """What a statement takes a batch apart into."""
    import ast

    return batch_rows._parts(ast.parse(statement).body[0])


@pytest.mark.parametrize(
    ("statement", "order"),
    [
        ("noise_pred_uncond, noise_pred_text = x.chunk(2)", ("uncond", "cond")),
        ("noise_cond, noise_uncond = torch.split(x, len(x) // 2, dim=0)", ("cond", "uncond")),
        ("noise_uncond, noise_pred = x.chunk(2)", ("uncond", "cond")),
        ("noise_pred, noise_uncond = x.chunk(2, dim=0)", ("cond", "uncond")),
        ("a_text, an_image, a_neg = x.chunk(3)", ("cond", "image", "uncond")),
        ("eps_uncond, eps_text, eps_perturb = x.chunk(3)", ("uncond", "cond", "perturbed")),
        ("noise_uncond, noise_pred = x.chunk(2, dim=1)", None),
        ("noise_uncond, noise_pred = x.chunk(2, axis=-1)", None),
        ("noise_uncond, noise_pred = x.chunk(2, 1)", None),
        ("noise_uncond, noise_pred = x.chunk(2, 0)", ("uncond", "cond")),
        ("noise_uncond, noise_pred = torch.chunk(x, 2, 1)", None),
        ("noise_uncond, noise_pred = torch.chunk(x, 2)", ("uncond", "cond")),
        ("noise_uncond, noise_pred = torch.split(x, n, dim=axis)", None),
        ("uncond_embeds, text_embeds = x.chunk(2)", None),
        ("uncond, _ = x.chunk(2)", None),
        ("uncond, a.b = x.chunk(2)", None),
        ("uncond, text = x.view(2)", None),
        ("uncond, text = chunk(x, 2)", None),
        ("uncond, text = x", None),
        ("uncond = x.chunk(2)", None),
        ("first, second = x.chunk(2)", None),
        ("uncond, first, second = x.chunk(3)", None),
        ("uncond, text, cond = x.chunk(3)", None),
        ("cond, rest = x.chunk(2)", None),
    ],
)
def test_statements_that_take_a_prediction_apart(statement, order):
    assert says(statement) == order


class Twice:
    def __call__(self, x):
        uncond, text = x.chunk(2)
        text, uncond = x.chunk(2)
        return uncond, text


def test_a_call_that_says_two_things_says_nothing():
    assert batch_rows._stated(Twice) is None and batch_rows._stated(Own) is None
    assert batch_rows._stated(Says) == batch_rows._stated(type("Below", (Says,), {})) == ("uncond", "cond")
    assert batch_rows._stated(type("Below", (Says,), {"__call__": Own.__call__})) == ("uncond", "cond")  # of a base
    assert batch_rows._stated(object) is None


def test_halves_of_one_sample():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    twice, texts = torch.cat([x, x]), torch.cat([y, y + 1])
    assert of_one_sample({"x": twice, "t": torch.tensor(5.0), "text": texts})
    assert not of_one_sample({"x": twice, "text": torch.cat([y, y])})  # the same conditions
    assert not of_one_sample({"x": torch.cat([x, y]), "text": texts})
    assert not of_one_sample({"x": twice[:3], "text": texts[:3]}) and not of_one_sample({"x": twice})
    assert not of_one_sample({"x": twice, "text": texts[:2]}) and not of_one_sample({})
    assert of_one_sample({"x": twice, "same": torch.cat([y, y]), "text": texts})
    assert not of_one_sample({"x": torch.tensor(1.0)})


@pytest.mark.parametrize(
    ("pipe", "asked", "want"),
    [
        ({}, {"true_cfg_scale": 4}, 4.0), ({}, {"true_cfg_scale": 1.0, "guidance_scale": 9}, None),
        ({}, {"true_cfg_scale": None}, None), ({}, {"guidance_scale": 3}, 3.0), ({}, {"guidance_scale": 1.0}, None),
        ({}, {"guidance_scale": 0.5}, None), ({}, {}, None),
        ({"guidance_scale": 5.0}, {"guidance_scale": 3}, 5.0),
        ({"guidance_scale": 5.0, "do_classifier_free_guidance": False}, {}, None),
        ({"guidance_scale": 0.5, "do_classifier_free_guidance": True}, {}, 0.5),
        ({"do_classifier_free_guidance": True}, {}, None),
        ({"guidance_scale": 5.0, "transformer_2": "second"}, {"guidance_scale_2": 2.0}, 2.0),
        ({"guidance_scale": 5.0, "transformer_2": "other"}, {"guidance_scale_2": 2.0}, 5.0),
        ({"guidance_scale": 5.0, "transformer_2": "second"}, {"guidance_scale_2": None}, 5.0),
    ],
)  # fmt: skip
def test_the_scale_of_guidance(pipe, asked, want):
    assert guidance_of(SimpleNamespace(**pipe), asked, "second") == want
    if want == 2.0:
        assert guidance_of(SimpleNamespace(**pipe), asked) == 5.0  # no denoiser is at hand


class Normed:
    def __call__(self, x):
        cond_norm = x.norm()
        return x / cond_norm


def test_whether_guidance_is_rescaled():
    for asked, want in (
        ({}, False), ({"guidance_rescale": 0.0}, False), ({"guidance_rescale": 0.7}, True),
        ({"cfg_normalization": False, "guidance_rescale": 0.7}, False), ({"cfg_normalization": True}, True),
    ):  # fmt: skip
        assert rescales(Own(), asked) is want
    assert rescales(Normed(), {}) and not rescales(Normed(), {"cfg_normalization": False})
    assert not rescales(None, {})
