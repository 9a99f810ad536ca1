# SPDX-License-Identifier: Apache-2.0
"""A source beside what is denoised: dense references, what each way leaves alone, and what it costs."""

from dataclasses import dataclass

import pytest
import torch
from tests.tolerance import DEEP, assert_close, is_far
from torch import nn

import manyheads
from manyheads.calls.condition import Condition
from manyheads.errors import UserError
from manyheads.integrations.source_condition import conditioned, size_of
from manyheads.strategy import AttentionEdit

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
pytestmark = pytest.mark.filterwarnings("ignore:.*timestep.*")

DIM, HEADS, LAYERS, TOKENS = 24, 2, 2, 8
CROSS, CHANNELS, SAME = "native3d_edit.cross_attention", "native3d_edit.channels", "native3d_edit:time=same"


def wan(**changes):
    torch.manual_seed(0)
    config = {
        "patch_size": (2, 2, 2), "num_attention_heads": HEADS, "attention_head_dim": DIM // HEADS, "in_channels": 2,
        "out_channels": 2, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "num_layers": LAYERS, "rope_max_seq_len": 8,
    }  # fmt: skip
    return diffusers.WanTransformer3DModel(**{**config, **changes}).double().eval()


def pixart():
    torch.manual_seed(0)
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=2, out_channels=2, num_layers=2,
        cross_attention_dim=24, sample_size=8, patch_size=2, caption_channels=16, use_additional_conditions=False,
    ).double().eval()  # fmt: skip


def sd3():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=2, out_channels=2, num_layers=2, attention_head_dim=12,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=24, pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).double().eval()  # fmt: skip


def inputs(*grid, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return drawn(2, 2, *grid), drawn(2, 2, *grid), torch.tensor([300.0, 800.0], dtype=torch.float64), drawn(2, 3, 16)


def given(denoiser, text):
    more = {"encoder_hidden_states": text}
    if type(denoiser).__name__.startswith("SD3"):
        more["pooled_projections"] = text.mean(1)
    if type(denoiser).__name__.startswith("PixArt"):
        more["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return more


def run(denoiser, strategy, target, source, time, text):
    with torch.no_grad():
        return conditioned(denoiser, strategy)(target, source, time, **given(denoiser, text))


def plain(denoiser, target, time, text):
    with torch.no_grad():
        return denoiser(hidden_states=target, timestep=time, return_dict=False, **given(denoiser, text))[0]


DENOISERS = {"wan": (wan, (4, 4, 4)), "image": (lambda: wan(patch_size=(1, 2, 2)), (1, 6, 4)),
             "pixart": (pixart, (8, 8)), "sd3": (sd3, (8, 8))}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Blind(AttentionEdit):
    """Queries of the target see no keys of the source."""

    def edit(self, call):
        if call.q.shape[2] != 2 * TOKENS or call.k.shape[2] != 2 * TOKENS:
            return call
        mask = torch.ones(2 * TOKENS, 2 * TOKENS, dtype=torch.bool)
        mask[:TOKENS, TOKENS:] = False
        return call.replace(mask=mask[None, None])


@pytest.mark.parametrize("strategy", ["native3d_edit", SAME])
def test_hidden_source_tokens_leave_the_denoiser_as_it_is(strategy):
    """Target queries that see no source keys: the output is the plain denoiser's; control: they see them."""
    denoiser = wan()
    target, source, time, text = inputs(4, 4, 4)
    want = plain(denoiser, target, time, text)
    with manyheads.use(denoiser, Blind()):
        got = run(denoiser, strategy, target, source, time, text)
    assert_close(got, want, DEEP)
    assert is_far(run(denoiser, strategy, target, source, time, text), want, DEEP)


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("strategy", [None, CROSS, CHANNELS])
def test_what_begins_at_zero_is_the_denoiser_bit_by_bit(name, strategy):
    make, grid = DENOISERS[name]
    denoiser = make()
    if strategy == CROSS and name == "sd3":
        with pytest.raises(UserError, match="no attention to text of its own"):
            conditioned(denoiser, strategy)
        return
    target, source, time, text = inputs(*grid)
    made = conditioned(denoiser, strategy)
    with torch.no_grad():
        got = made(target, source, time, **given(denoiser, text))
        assert torch.equal(got, plain(denoiser, target, time, text))
        for parameter in made.condition.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64))
        moved = made(target, source, time, **given(denoiser, text))
        other = made(target, source + 1, time, **given(denoiser, text))
    if strategy is not None:  # once trained, the source counts
        assert is_far(moved, got, DEEP) and is_far(other, moved, DEEP)
    else:
        assert torch.equal(other, got)


@pytest.mark.parametrize("name", DENOISERS)
def test_the_source_counts_from_the_first_step_on_every_denoiser(name):
    make, grid = DENOISERS[name]
    denoiser = make()
    target, source, time, text = inputs(*grid)
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    kind = type(denoiser.pos_embed if hasattr(denoiser, "pos_embed") else denoiser.patch_embedding)
    out, other = (run(denoiser, SAME, target, s, time, text) for s in (source, source + 1))
    assert out.shape == target.shape and is_far(out, other, DEEP)
    assert torch.equal(plain(denoiser, target, time, text), plain(denoiser, target, time, text))
    assert all(torch.equal(value, before[key]) for key, value in denoiser.state_dict().items())
    assert type(denoiser.pos_embed if hasattr(denoiser, "pos_embed") else denoiser.patch_embedding) is kind


def test_only_wan_has_a_time_for_every_token():
    for make in (pixart, sd3):
        with pytest.raises(UserError, match="time=same"):
            conditioned(make(), "native3d_edit")


def sequence(denoiser, tokens, rotary, time, text):
    """A Wan's blocks and head over tokens of any positions and times, as its own forward goes on from there."""
    temb, projected, text, _ = denoiser.condition_embedder(
        time.flatten(), text, None, timestep_seq_len=time.shape[1]
    )  # fmt: skip
    projected = projected.unflatten(2, (6, -1))
    for block in denoiser.blocks:
        tokens = block(tokens, text, projected, rotary)
    shift, scale = (denoiser.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)).chunk(2, dim=2)
    return denoiser.proj_out(denoiser.norm_out(tokens) * (1 + scale.squeeze(2)) + shift.squeeze(2))


def tokens_of(denoiser, latents):
    return denoiser.patch_embedding(latents).flatten(2).transpose(1, 2)


def grid_of(flat):
    """Patches ``[B, 8, 2 * 2 * 2 * 2]`` back on the grid of 4 x 4 x 4."""
    return torch.einsum("nthwpqrc->nctphqwr", flat.reshape(2, 2, 2, 2, 2, 2, 2, 2)).reshape(2, 2, 4, 4, 4)


def permuted(order):
    def join(target, source):
        return torch.cat([target, source[:, order]], 1)

    return join


@torch.no_grad()
@pytest.mark.parametrize("clean", [True, False])
def test_tokens_against_blocks_called_by_hand(clean):
    """Both streams, their positions and times; controls: positions that go on, source vectors swapped, another time."""
    denoiser = wan()
    target, source, time, text = inputs(4, 4, 4)
    made = conditioned(denoiser, "native3d_edit" if clean else SAME)
    made.condition.stream.copy_(torch.randn(2, DIM, generator=torch.Generator().manual_seed(3)))
    got = made(target, source, time, encoder_hidden_states=text)

    def by_hand(stream, clean, far=False):
        x = torch.cat([tokens_of(denoiser, target) + stream[0], tokens_of(denoiser, source) + stream[1]], 1)
        tables = [torch.cat([table, table], 1) for table in denoiser.rope(target)]
        if far:
            tables = denoiser.rope(torch.cat([target, source], 2))
        own = time[:, None].expand(-1, TOKENS)
        times = torch.cat([own, torch.zeros_like(own) if clean else own], 1)
        return grid_of(sequence(denoiser, x, tables, times, text)[:, :TOKENS])

    stream = made.condition.stream
    assert_close(got, by_hand(stream, clean), DEEP)
    for wrong in (by_hand(stream.flip(0), clean), by_hand(stream, not clean), by_hand(stream, clean, far=True)):
        assert is_far(got, wrong, DEEP)


@torch.no_grad()
def test_the_order_of_source_tokens_is_nothing_their_positions_are():
    denoiser = wan()
    target, source, time, text = inputs(4, 4, 4)
    made = conditioned(denoiser, "native3d_edit")
    want = made(target, source, time, encoder_hidden_states=text)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(4))
    made.condition.join = permuted(order)
    assert_close(made(target, source, time, encoder_hidden_states=text), want, DEEP)
    made.condition.embedded = lambda tokens, others, _: torch.cat([tokens, others], 1)  # control: tokens stay
    assert is_far(made(target, source, time, encoder_hidden_states=text), want, DEEP)


def test_nothing_is_learned_from_what_source_tokens_would_become():
    denoiser = wan()
    target, source, time, text = inputs(4, 4, 4)
    seen = []
    denoiser.proj_out.register_forward_hook(lambda _, __, out: (out.retain_grad(), seen.append(out))[0])
    conditioned(denoiser, "native3d_edit")(target, source, time, encoder_hidden_states=text).square().sum().backward()
    found = seen[0].grad.abs().sum((0, 2))
    assert torch.equal(found[TOKENS:], torch.zeros(TOKENS, dtype=torch.float64)) and bool((found[:TOKENS] > 0).all())


@torch.no_grad()
def test_cross_attention_is_its_formula():
    """The first layer by a dense softmax with rotated queries and keys; control: keys of the wrong place."""
    denoiser = wan()
    source = inputs(4, 4, 4)[1]
    made = conditioned(denoiser, CROSS)
    layer = made.condition.layers[0]
    generator = torch.Generator().manual_seed(5)
    for p in made.condition.parameters():
        p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    hidden = torch.randn(2, TOKENS, DIM, generator=generator, dtype=torch.float64)
    tokens, rotary = tokens_of(denoiser, source), denoiser.rope(source)

    def turned(x, shift=0):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        phase = torch.complex(rotary[0][..., ::2].double(), rotary[1][..., ::2].double()).roll(shift, 1)
        return torch.view_as_real(pairs * phase).flatten(-2)

    def by_hand(shift):
        n = (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        q, k, v = hidden @ layer.query.weight.T, n @ layer.key.weight.T, n @ layer.value.weight.T
        q, k, v = q + layer.query.bias, k + layer.key.bias, v + layer.value.bias
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for x, norm in ((q, layer.query_norm), (k, layer.key_norm))
        )
        q, k, v = (x.unflatten(2, (HEADS, -1)) for x in (q, k, v))
        weights = torch.einsum("bthd,bshd->bhts", turned(q), turned(k, shift)) * (DIM // HEADS) ** -0.5
        out = torch.einsum("bhts,bshd->bthd", weights.softmax(-1), v).flatten(2)
        return out @ layer.out.weight.T + layer.out.bias

    got = made.condition.added(0, hidden, tokens, rotary)
    assert_close(got, by_hand(0), DEEP)
    assert is_far(got, by_hand(1), DEEP)


@torch.no_grad()
def test_channels_are_a_wider_embedding():
    """One convolution over both, as an editor that is built with more channels has it; control: channels swapped."""
    denoiser = wan()
    target, source, _, _ = inputs(4, 4, 4)
    made = conditioned(denoiser, CHANNELS)
    made.condition.embed.weight.copy_(torch.randn(made.condition.embed.weight.shape))
    old = denoiser.patch_embedding
    wide = nn.Conv3d(4, DIM, 2, 2).double()
    wide.weight.copy_(torch.cat([old.weight, made.condition.embed.weight], 1))
    wide.bias.copy_(old.bias)
    got = made.condition.embedded(tokens_of(denoiser, target), tokens_of(denoiser, source), source)
    assert_close(got, wide(torch.cat([target, source], 1)).flatten(2).transpose(1, 2), DEEP)
    assert is_far(got, wide(torch.cat([source, target], 1)).flatten(2).transpose(1, 2), DEEP)


def test_new_parameters_are_counted():
    denoiser = wan()
    counts = {
        spec: sum(p.numel() for p in conditioned(denoiser, spec).condition.parameters())
        for spec in ("native3d_edit", "native3d_edit:stream=false", CROSS, CHANNELS)
    }
    assert list(counts.values()) == [2 * DIM, 0, LAYERS * (4 * DIM * DIM + 6 * DIM), DIM * 2 * 8]
    assert counts[CROSS] > 100 * counts["native3d_edit"] / 2


def test_a_source_on_another_grid_and_other_strategies_are_refused():
    denoiser = wan()
    target, source, time, text = inputs(4, 4, 4)
    with pytest.raises(UserError, match="one grid"):
        conditioned(denoiser, "native3d_edit")(target, source[..., :2], time, encoder_hidden_states=text)
    with pytest.raises(UserError, match="sag shows a denoiser no source"):
        conditioned(denoiser, "sag")
    with pytest.raises(UserError, match="Linear is not known"):
        conditioned(nn.Linear(2, 2), None)
    with pytest.raises(UserError, match="trained with a denoiser"):
        manyheads.use(denoiser, "native3d_edit").__enter__()


def test_a_failed_call_leaves_the_denoiser_as_it_was():
    denoiser = wan()
    target, source, time, text = inputs(4, 4, 4)
    want, kind = plain(denoiser, target, time, text), type(denoiser.patch_embedding)
    with pytest.raises(RuntimeError):
        conditioned(denoiser, CROSS)(target, source, time, encoder_hidden_states=text[..., :3])
    assert type(denoiser.patch_embedding) is kind and torch.equal(plain(denoiser, target, time, text), want)


def test_a_condition_that_does_nothing():
    assert not Condition.joined and size_of(pixart()).patch == (2, 2)
    nothing = Condition()
    x = torch.ones(1, 2, 3)
    assert nothing.embedded(x, x + 1, x) is x
    for call in (lambda: nothing.join(x, x), lambda: nothing.added(0, x, x, None)):
        with pytest.raises(NotImplementedError):
            call()
