# SPDX-License-Identifier: Apache-2.0
"""Laws of whole texts against all texts of a tiny vocabulary, weighed one by one in float64."""

import itertools

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import manyheads
from manyheads import UserError, parse
from manyheads.decoding._cut import Cut
from manyheads.decoding.lnd import Chain
from manyheads.decoding.lnd.lnd import _ancestors
from manyheads.integrations.decoding import write, write_each
from manyheads.integrations.model_access import Access
from manyheads.integrations.transformers import new_cache, prefill
from manyheads.writing import Request
from tiny import chat
from tiny.compare import tiny
from tolerance import DRAWN, FORMULA, WRONG, assert_close, is_close, is_far, mean_error, share_error

V, N, END = 5, 4, 0
SETTLED = 2e-12  # of a power iteration that ends at changes of 1e-13
PROMPTS = torch.tensor([[3, 1, 4], [2, 2, 1]])
SPECS = {
    "top_k": "top_k=2",
    "top_p": "top_p=0.7",
    "temperature": "temperature=0.6",
    "both": "temperature=0.8,top_k=3",
    "min_p": "min_p=0.4",
}
CUTS = {name: parse(f"sampling:{spec}") for name, spec in SPECS.items()}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(50)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 0.6  # contexts then keep very different masses
    return model


@pytest.fixture(scope="module")
def texts(model):
    """All texts of up to N tokens, the end being one, and logits of every next token after each prompt."""
    every = [
        w for w in itertools.product(range(V), repeat=N) if all(b == END for a, b in itertools.pairwise(w) if a == END)
    ]
    ids = torch.tensor(every)
    found = []
    for prompt in PROMPTS:
        with torch.inference_mode():
            whole = torch.cat([prompt.expand(len(ids), -1), ids], 1)
            found.append(model(whole).logits[:, len(prompt) - 1 : -1].double())
    return ids, torch.stack(found)  # [M, N], [P, M, N, V]


def weighed(texts, cut, prompt=0):
    """Of each text: log p, log weight and log mass, float64 ``[M]``; tokens behind the end count nothing."""
    ids, logits = texts[0], texts[1][prompt]
    heavy = cut.log_weights(logits.reshape(-1, V)).view(logits.shape)
    counts = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), ids[:, :-1] != END], 1)
    taken = ids[..., None]
    of = (logits.log_softmax(-1).gather(2, taken)[..., 0], heavy.gather(2, taken)[..., 0], heavy.logsumexp(-1))
    return [x.masked_fill(~counts, 0.0).sum(1) for x in of]


def asked(model, copies=1, seed=0, prompts=PROMPTS):
    cache = new_cache(model, parse("full"))
    prefill(model, prompts, cache)
    return Request(model, None, prompts, N, frozenset({END}), seed, cache)


def counted(texts, tokens):
    """How often each text is among ``tokens [K, <= N]``, of which -1 or the end stands behind the end."""
    ids = texts[0]
    tokens = torch.nn.functional.pad(tokens, (0, N - tokens.shape[1]), value=END).clamp(min=END)
    code = V ** torch.arange(N)
    place = {int(c): i for i, c in enumerate((ids * code).sum(1))}
    return torch.bincount(torch.tensor([place[int(c)] for c in (tokens * code).sum(1)]), minlength=len(ids))


def same(found, wanted, limit=FORMULA):
    """Figures of a few nats, differences of such among them."""
    found, wanted = (torch.tensor(x, dtype=torch.float64) for x in (found, wanted))
    assert_close(found, wanted, limit, unit=4.0)


def both(texts, cut, prompt=0):
    """Laws of whole texts and of plain sampling."""
    _, log_w, log_z = weighed(texts, cut, prompt)
    return log_w.softmax(0), (log_w - log_z).exp()


@pytest.mark.parametrize("name", CUTS)
def test_identities_of_whole_texts(texts, name):
    cut = CUTS[name]
    log_p, log_w, log_z = weighed(texts, cut)
    share, tau = log_w.logsumexp(0), cut.temperature
    whole, plain = both(texts, cut)
    assert_close(plain.sum(), torch.tensor(1.0).double())

    def mean(q, x):
        return float((q * x.masked_fill(q == 0, 0.0)).sum())

    entropy = {law: -mean(q, q.log()) for law, q in (("whole", whole), ("plain", plain))}
    same(entropy["whole"], -mean(whole, log_p) / tau + float(share))
    # What plain sampling maximises has one more term, and the value 0: the reward of its distortion.
    same(entropy["plain"] + mean(plain, log_p) / tau - mean(plain, log_z), 0.0)
    divergence = mean(plain, plain.log() - whole.log())
    same(divergence, float(share) - mean(plain, log_z))
    assert divergence > 1e-3
    gap = entropy["whole"] + mean(whole, log_p) / tau - entropy["plain"] - mean(plain, log_p) / tau
    same(gap, divergence)
    if tau != 1:  # the corollary as printed, with the distortion of the model before it is tempered
        untempered = weighed(texts, Cut(top_k=cut.top_k))[2]
        assert abs(entropy["plain"] + mean(plain, log_p) / tau - mean(plain, untempered)) > 0.01


@pytest.mark.parametrize("name", ["top_k", "both"])
def test_particles_have_the_law_of_whole_texts_after_every_prompt(model, texts, name):
    strategy = parse(f"lnd:particles=20,resample=0.9,{SPECS[name]}")
    with manyheads.use(model), torch.inference_mode():
        found = strategy.grow(asked(model), Access(model), 1200, torch.Generator().manual_seed(1))
    chosen = torch.multinomial(found.log_weight.exp(), 1, generator=torch.Generator().manual_seed(2))
    picked = found.tokens.gather(1, chosen[..., None].expand(-1, 1, found.tokens.shape[2]))[:, 0]
    for prompt in range(2):
        whole, plain = both(texts, CUTS[name], prompt)
        counts = counted(texts, picked.view(2, 1200, -1)[prompt])
        assert share_error(counts, whole) < DRAWN < WRONG < share_error(counts, plain)
        assert share_error(counts, both(texts, CUTS[name], 1 - prompt)[0]) > WRONG
        log_w = weighed(texts, CUTS[name], prompt)[1]
        shares = found.log_share.view(2, 1200)[prompt].double().exp()
        exact = float(log_w.exp().sum())
        assert mean_error(shares, exact, float(shares.std())) < DRAWN
        assert mean_error(shares, exact**0.9, float(shares.std())) > WRONG
    assert found.resampled > 0 and float(found.effective.min()) >= 1


def test_what_particles_say_of_their_texts(model, texts):
    strategy = parse("lnd:particles=64,top_k=2,resample=0.9")
    with manyheads.use(model), torch.inference_mode():
        found = strategy.grow(asked(model), Access(model), 3, torch.Generator().manual_seed(5))
    own = found.tokens[0]  # of the first prompt
    log_p, _, log_z = weighed(texts, CUTS["top_k"])
    place = [int(counted(texts, row[None]).argmax()) for row in own]
    assert_close(found.log_p[0], log_p[place].float(), 1e-5)
    assert_close(found.log_mass[0], log_z[place].float(), 1e-5)
    assert is_far(found.log_mass[0], log_z[place].roll(1).float(), 1e-5)
    assert_close(found.log_weight.exp().sum(1), torch.ones(6))


@pytest.mark.parametrize("name", ["top_k", "temperature"])
def test_rejection_has_the_law_of_whole_texts_and_accepts_their_share(model, texts, name):
    strategy, count = parse(f"lnd.rejection:{SPECS[name]}"), 6_000
    with manyheads.use(model):
        found, _ = strategy.accepted(
            asked(model, prompts=PROMPTS[:1]), Access(model), count, torch.Generator().manual_seed(4)
        )
    whole, plain = both(texts, CUTS[name])
    counts = counted(texts, found)
    assert share_error(counts, whole) < DRAWN < WRONG < share_error(counts, plain)
    share = float(weighed(texts, CUTS[name])[1].exp().sum())
    kept = torch.zeros(count).index_fill(0, torch.arange(len(found)), 1.0)
    deviation = (share * (1 - share)) ** 0.5
    assert mean_error(kept, share, deviation) < DRAWN < WRONG < mean_error(kept, share**0.9, deviation)


def test_rejection_goes_on_until_one_comes_through_or_says_so(model):
    with manyheads.use(model):
        first = write(parse("lnd.rejection:top_k=1,batch=1,tries=4000"), asked(model, prompts=PROMPTS[:1], seed=3))
        greedy = write(parse("sampling:top_k=1"), asked(model, prompts=PROMPTS[:1]))
        assert first.tokens == greedy.tokens and first.notes["tried"] > 1
        with pytest.raises(UserError, match="take lnd"):
            write(parse("lnd.rejection:top_k=1,batch=1,tries=1"), asked(model, prompts=PROMPTS[:1], seed=3))


def test_without_a_cut_every_text_weighs_the_same_and_one_token_is_plain(model, texts):
    generator = torch.Generator().manual_seed(0)
    with manyheads.use(model), torch.inference_mode():
        free = parse("lnd").grow(asked(model), Access(model), 2, generator)
        cut = parse("lnd:top_k=2").grow(asked(model), Access(model), 2, generator)
    assert_close(free.log_share.exp(), torch.ones(4), 1e-5)
    assert_close(free.effective, torch.full((4,), 16.0), 1e-5)
    assert free.resampled == 0 and is_far(cut.log_share.exp(), torch.ones(4), 1e-3)
    whole, plain = both(texts, Cut())
    assert_close(whole, plain)
    assert not is_close(*both(texts, CUTS["top_k"]))


def test_ancestors_are_as_many_as_their_weights_say():
    weight = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.7, 0.1, 0.1, 0.1]]).log()
    low = torch.tensor([True, False])
    for seed in range(8):
        taken = _ancestors(weight, low, torch.Generator().manual_seed(seed))
        assert taken[0].bincount(minlength=4).tolist() == [2, 1, 1, 0] and taken[1].tolist() == [4, 5, 6, 7]


def test_several_at_once_are_each_as_alone(model):
    def fresh(ids):
        cache = new_cache(model, parse("full"))
        prefill(model, ids, cache)
        return cache

    with manyheads.use(model):
        request = Request(model, None, PROMPTS, N, frozenset({END}))
        together = write_each(parse("sampling:top_k=1"), request, 2, fresh)
        alone = [write(parse("sampling:top_k=1"), asked(model, prompts=row[None])) for row in PROMPTS]
        assert [[text.tokens for text in texts] for texts in together] == [[one.tokens] * 2 for one in alone]
        assert alone[0].tokens != alone[1].tokens
        for spec in ("lnd:top_k=1", "lnd.rejection:top_k=1,batch=64"):
            found = write_each(parse(spec), request, 2, fresh)
            assert [[text.tokens for text in texts] for texts in found] == [[one.tokens] * 2 for one in alone]
        assert set(write_each(parse("lnd"), request, 1, fresh)[0][0].notes) >= {"log_share", "log_distortion"}


@pytest.fixture(scope="module")
def chain():
    """Log-probabilities of a chain whose state is the last two tokens of three, and weights of its two likeliest."""
    log_p = (1.5 * torch.randn(9, 3, generator=torch.Generator().manual_seed(13), dtype=torch.float64)).log_softmax(1)
    after = torch.tensor([[3 * (state % 3) + token for token in range(3)] for state in range(9)])
    return log_p, Chain(Cut(top_k=2, temperature=0.9).log_weights(log_p), after)


def walked(chain, table, start, steps=5):
    """Sum of ``table [steps, S, V]`` along each of all texts from a state, ``[3 ** steps]``."""
    found = []
    for text in itertools.product(range(3), repeat=steps):
        state, total = start, 0.0
        for t, token in enumerate(text):
            total += float(table[t, state, token])
            state = int(chain.after[state, token])
        found.append(total)
    return torch.tensor(found, dtype=torch.float64)


def test_a_chain_sums_all_texts(chain):
    _, chain = chain
    weights = walked(chain, chain.log_w.expand(5, -1, -1), 4)
    sums = chain.log_sums(5)[:, 4]
    assert_close(sums[5], weights.logsumexp(0), 1e-14)
    assert is_far(sums[4], weights.logsumexp(0), 1e-14)
    assert_close(walked(chain, chain.whole(5), 4).exp(), weights.softmax(0))
    assert is_far(walked(chain, chain.local.expand(5, -1, -1), 4).exp(), weights.softmax(0))


def test_pressure_and_equilibrium_state(chain):
    log_p, chain = chain
    pressure, state = chain.equilibrium()
    operator = torch.zeros(9, 9, dtype=torch.float64).index_put_(
        (torch.arange(9)[:, None].expand(9, 3), chain.after), chain.log_w.exp(), accumulate=True
    )
    same(pressure, float(torch.linalg.eigvals(operator).real.max().log()), SETTLED)
    assert float(chain.log_sums(400)[400, 0]) / 400 == pytest.approx(pressure, abs=0.02)
    assert_close(state, chain.whole(200)[0], 1e-9)
    assert is_far(chain.local, state)

    def reward(log_q):
        law = chain.law(log_q, log_p)
        return law.entropy - law.energy / 0.9

    best = reward(state)
    same(best, pressure, SETTLED)
    plain = chain.law(chain.local, log_p)
    same(plain.entropy - plain.energy / 0.9 - plain.log_mass, 0.0, SETTLED)
    for seed in range(6):
        noise = 0.2 * torch.randn(9, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert reward((state + noise).log_softmax(1)) < best
    assert reward(chain.local) < best


def test_nothing_is_distorted_where_contexts_keep_the_same(chain):
    same = torch.randn(1, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(1)
    for cut in (Cut(top_k=2), Cut(top_p=0.6), Cut(temperature=0.5)):
        alike = Chain(cut.log_weights(same.expand(9, 3)), chain[1].after)
        assert_close(alike.equilibrium()[1].exp(), alike.local.exp(), 1e-9)
    assert is_far(chain[1].equilibrium()[1].exp(), chain[1].local.exp())


def test_in_one_line():
    model, reader = tiny(), chat.tokenizer()
    how = {"max_new_tokens": 6}
    for spec in ("lnd:top_k=20,particles=4", "lnd:top_p=0.9,particles=4 + keydiff:budget=0.9"):
        texts = [manyheads.reply(model, reader, "Who was seen near the river", spec, seed=s, **how) for s in (1, 1, 2)]
        assert texts[0] and texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    "spec",
    ["lnd:particles=0", "lnd:resample=2", "lnd:top_p=0", "lnd.rejection:temperature=1.2", "lnd.rejection:batch=0"],
)
def test_wrong_settings_are_refused(spec):
    with pytest.raises(UserError, match=r"\d"):
        parse(spec)


def test_a_chain_without_a_way_on_is_refused():
    with pytest.raises(UserError, match="after every state"):
        Chain(torch.full((2, 2), -torch.inf), torch.zeros(2, 2, dtype=torch.long))
    apart = Chain(torch.tensor([[0.0], [-1.0]]).double(), torch.tensor([[0], [1]]))
    with pytest.raises(UserError, match="no single equilibrium"):
        apart.equilibrium()
