# SPDX-License-Identifier: Apache-2.0
"""Query-shared cross-attention: dense references, streams of their own, and what passes through the blocks apart."""

import pytest
import torch
from tests.tolerance import DEEP, PROJECTED, SAME, assert_close, is_far
from torch.nn.functional import gelu, layer_norm

import manyheads
from manyheads.calls.condition import Stream, ViewCondition
from manyheads.conditioning import DenoiserConfig
from manyheads.diffusion.postcam.postcam import frame_positions
from manyheads.errors import UserError
from manyheads.integrations.source_condition import conditioned

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
pytestmark = pytest.mark.filterwarnings("ignore:.*timestep.*")

DIM, HEADS, LAYERS, FRAMES = 24, 2, 2, 3
GRID, SMALL = (FRAMES, 4, 4), (FRAMES, 2, 2)
TOKENS, FEW = 48, 12
SHORT = "postcam:hidden=16"
EVERY = [SHORT, f"{SHORT},render=false", f"{SHORT},pose=false", f"{SHORT},softmax=separate", "postcam.pose_added"]


def wan(**changes):
    torch.manual_seed(0)
    config = {
        "patch_size": (1, 2, 2), "num_attention_heads": HEADS, "attention_head_dim": DIM // HEADS, "in_channels": 2,
        "out_channels": 2, "text_dim": 16, "freq_dim": 16, "ffn_dim": 48, "num_layers": LAYERS, "rope_max_seq_len": 8,
    }  # fmt: skip
    return diffusers.WanTransformer3DModel(**{**config, **changes}).double().eval()


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs():
    latents = drawn(2, 2, 2, FRAMES, 8, 8)
    return {
        "target": latents[0], "source": latents[1], "timestep": torch.tensor([300.0, 800.0], dtype=torch.float64),
        "cameras": drawn(2, FRAMES, 3, 4, seed=2), "render": drawn(2, 2, FRAMES, 4, 4, seed=3),
        "encoder_hidden_states": drawn(2, 3, 16, seed=4),
    }  # fmt: skip


def made(spec, denoiser=None, trained=True):
    """A conditioned denoiser; ``trained``: all new weights are drawn, those at zero too."""
    torch.manual_seed(1)
    film = conditioned(wan() if denoiser is None else denoiser, spec)
    if trained:
        with torch.no_grad():
            for number, parameter in enumerate(film.condition.parameters()):
                parameter.add_(0.3 * drawn(*parameter.shape, seed=number))
    return film


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x, angles):
    """Pairs of neighbouring channels of ``[B, M, H, d]`` by ``angles [M, d / 2]``."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]).flatten(-2)


def angles_of(rotary):
    return torch.atan2(rotary[1], rotary[0])[0, :, 0, ::2]


def streams():
    """A target, poses and a rendering for a layer alone, each with positions of its own."""
    tokens = [drawn(2, count, DIM, seed=5 + i) for i, count in enumerate((TOKENS, FRAMES, FEW))]
    tables = [drawn(1, count, 1, DIM // HEADS // 2, seed=8 + i) for i, count in enumerate((TOKENS, FRAMES, FEW))]
    tables = [(t.cos().repeat_interleave(2, -1), t.sin().repeat_interleave(2, -1)) for t in tables]
    return [Stream(x, table) for x, table in zip(tokens, tables, strict=True)]


def logits_and_values(layer, hidden, stream, suffix):
    key, value = getattr(layer, f"key{suffix}"), getattr(layer, f"value{suffix}")
    q = norm(hidden.tokens @ layer.query.weight.T + layer.query.bias, layer.query_norm.weight)
    k = norm(stream.tokens @ key.weight.T + key.bias, layer.key_norm.weight)
    q, k = turned(q.unflatten(2, (HEADS, -1)), angles_of(hidden.rotary)), turned(
        k.unflatten(2, (HEADS, -1)), angles_of(stream.rotary)
    )  # fmt: skip
    v = (stream.tokens @ value.weight.T + value.bias).unflatten(2, (HEADS, -1))
    return torch.einsum("bthd,bshd->bhts", q, k) / (DIM / HEADS) ** 0.5, v


def mixed(layer, weights, values):
    out = torch.einsum("bhts,bshd->bthd", weights, values).flatten(2)
    return (out @ layer.out.weight.T + layer.out.bias) @ layer.projector.weight.T + layer.projector.bias


@torch.no_grad()
def test_one_softmax_over_both_streams():
    """By a dense softmax over concatenated keys, and as the merge of two by their log-sum-exp; controls: the sum of two
    softmaxes, values swapped, keys of the rendering turned by other positions.
    """
    layer = made(SHORT).condition.layers[0]
    hidden, poses, render = streams()
    got = layer(hidden, poses, render)
    (first, one), (second, two) = (
        logits_and_values(layer, hidden, s, name) for s, name in ((poses, ""), (render, "_render"))
    )
    both, values = torch.cat([first, second], -1), torch.cat([one, two], 1)
    assert_close(got, mixed(layer, both.softmax(-1), values), 2 * PROJECTED)
    share = torch.sigmoid(first.logsumexp(-1) - second.logsumexp(-1))[..., None]
    merged = torch.cat([share * first.softmax(-1), (1 - share) * second.softmax(-1)], -1)
    assert_close(got, mixed(layer, merged, values), 2 * PROJECTED)
    reordered = torch.cat([second, first], -1).softmax(-1), torch.cat([two, one], 1)
    assert_close(got, mixed(layer, *reordered), 2 * PROJECTED)
    summed = torch.cat([first.softmax(-1), second.softmax(-1)], -1)
    moved = layer(hidden, poses, Stream(render.tokens, tuple(table.roll(1, 1) for table in render.rotary)))
    for wrong in (mixed(layer, summed, values), mixed(layer, both.softmax(-1), reordered[1]), moved):
        assert is_far(got, wrong, 2 * PROJECTED)
    assert_close(layer(hidden, poses, None), mixed(layer, first.softmax(-1), one), 2 * PROJECTED)
    assert_close(layer(hidden, None, render), mixed(layer, second.softmax(-1), two), 2 * PROJECTED)
    apart = made(f"{SHORT},softmax=separate").condition.layers[0]
    apart.load_state_dict(layer.state_dict())
    assert_close(apart(hidden, poses, render), mixed(layer, summed, values), 2 * PROJECTED)


@torch.no_grad()
def test_poses_are_encoded_from_twelve_numbers():
    """Row by row through four layers; control: column by column. Positions are the frame's number."""
    condition = made(SHORT).condition
    cameras = inputs()["cameras"]
    x = torch.stack([cameras[:, :, row, column] for row in range(3) for column in range(4)], -1)
    linear = [module for module in condition.encoder if isinstance(module, torch.nn.Linear)]
    assert [module.in_features for module in linear] == [12, 16, 16, 16]

    def encoded(x):
        for i, module in enumerate(linear):
            x = x @ module.weight.T + module.bias
            x = gelu(x) if i < 3 else x
        last = condition.encoder[-1]
        return layer_norm(x, (DIM,), last.weight, last.bias, 1e-6)

    assert_close(condition.poses(cameras), encoded(x), PROJECTED)
    assert is_far(condition.poses(cameras), encoded(x.unflatten(-1, (3, 4)).mT.flatten(-2)), PROJECTED)
    cos, sin = frame_positions(3, 4, x)
    want = torch.tensor([[f * 10_000 ** (-2 * i / 4) for i in (0, 0, 1, 1)] for f in range(3)], dtype=torch.float64)
    assert_close(cos[0, :, 0], want.cos(), PROJECTED)
    assert_close(sin[0, :, 0], want.sin(), PROJECTED)


def test_a_rendering_is_spread_over_the_grid():
    """Every second place from the first; where it does not fit, in the middle; control: the left upper corner."""
    condition = made(SHORT).condition
    at = torch.arange(2 * 4 * 6).view(1, -1, 1, 1)
    got = condition.placed((at, at), (2, 4, 6), (2, 2, 3))[0].flatten().tolist()
    assert got == [f * 24 + y * 6 + x for f in (0, 1) for y in (0, 2) for x in (0, 2, 4)]
    middle = condition.placed((at, at), (2, 4, 6), (2, 2, 2))[1].flatten().tolist()
    assert middle == [f * 24 + y * 6 + x for f in (0, 1) for y in (0, 2) for x in (1, 3)]
    assert condition.placed((at, at), (2, 4, 6), (2, 4, 6))[0].equal(at)


def by_hand(film, given, wrong=""):
    """What a Wan predicts with its blocks taken apart, as the formulas have it."""
    model, condition = film.denoiser, film.condition
    latents = torch.cat([given["target"], given["source"]], 2)
    x, r = (model.patch_embedding(z).flatten(2).transpose(1, 2) for z in (latents, given["render"]))
    rotary = model.rope(latents)
    own = tuple(table[:, :TOKENS] for table in rotary)
    spread = tuple(t.unflatten(1, GRID)[:, :, ::2, ::2].flatten(1, 3) for t in own)
    if wrong == "corner":
        spread = tuple(t.unflatten(1, GRID)[:, :, :2, :2].flatten(1, 3) for t in own)
    temb, time, text, _ = model.condition_embedder(given["timestep"], given["encoder_hidden_states"], None)
    time, p = time.unflatten(1, (6, -1)), condition.poses(given["cameras"])
    poses = Stream(p, frame_positions(FRAMES, DIM // HEADS, x))
    for layer, block in enumerate(model.blocks):
        shift, scale, gate, shift2, scale2, gate2 = (block.scale_shift_table + time).chunk(6, 1)

        def through(z, table, beside, block=block, parts=(shift, scale, gate, shift2, scale2, gate2)):
            shift, scale, gate, shift2, scale2, gate2 = parts
            read = block.norm1(z) * (1 + scale) + shift
            z = z + block.attn1(read, None, None, table) * gate
            z = z + beside(block.norm2(z), read)
            return z + block.ffn(block.norm3(z) * (1 + scale2) + shift2) * gate2

        shown = Stream((block.norm1(r) * (1 + scale) + shift) if wrong != "raw" else r, spread)

        def beside(n, _, layer=layer, shown=shown, block=block):
            n = n[:, :TOKENS]
            out = block.attn2(n, text, None, None) + condition.layers[layer](Stream(n, own), poses, shown)
            return torch.cat([out, torch.zeros_like(out)], 1)

        x = through(x, rotary, beside)
        if wrong != "still":
            r = through(r, spread, lambda n, _: torch.zeros_like(n))
    shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, 1)
    flat = model.proj_out(model.norm_out(x) * (1 + scale) + shift)[:, :TOKENS]
    return torch.einsum("nthwrcz->nzthrwc", flat.reshape(2, *GRID, 2, 2, 2)).reshape(2, 2, FRAMES, 8, 8)


@torch.no_grad()
def test_the_whole_denoiser_by_hand():
    """Positions of the source go on, the rendering passes through the blocks apart, text is told to the target alone;
    controls: a rendering that stays as embedded, one read before its norm, one in a corner of the grid.
    """
    film, given = made(SHORT), inputs()
    got = film(**given)
    assert_close(got, by_hand(film, given), SAME)  # norms of Wan are in float32
    for wrong in ("still", "raw", "corner"):
        assert is_far(got, by_hand(film, given, wrong), SAME)


@torch.no_grad()
@pytest.mark.parametrize("spec", EVERY)
def test_it_begins_as_the_denoiser_with_the_source_as_further_frames(spec):
    """Bit by bit, whatever cameras and rendering are; once trained each counts that the strategy is shown."""
    denoiser, given = wan(), inputs()
    start, none = made(spec, denoiser, trained=False), made("postcam:pose=false,render=false", denoiser)
    want = none(**given)
    assert torch.equal(start(**given), want) and not list(none.condition.parameters())
    film = made(spec, denoiser)
    got = film(**given)
    assert got.shape == given["target"].shape and is_far(got, want, DEEP)
    moved = {name: film(**{**given, name: given[name] + 1}) for name in ("source", "cameras", "render")}
    assert is_far(moved["source"], got, DEEP)
    assert torch.equal(moved["cameras"], got) == ("pose=false" in spec)
    assert torch.equal(moved["render"], got) == ("render=false" in spec or "added" in spec)
    kept = {name for name, x in given.items() if x is not None}
    assert kept == set(inputs()) and type(denoiser.blocks[0]).__name__ == "WanTransformerBlock"


@torch.no_grad()
def test_no_rendering_is_the_model_of_the_first_stage():
    """Weights of the rendering's keys and values are of no account then; control: with a rendering they are."""
    denoiser, given = wan(), inputs()
    film, first = made(SHORT, denoiser), made(f"{SHORT},render=false", denoiser)
    first.condition.load_state_dict(
        {name: x for name, x in film.condition.state_dict().items() if "_render" not in name}
    )  # fmt: skip
    want = first(**given)
    assert torch.equal(film(**{**given, "render": None}), want) and is_far(film(**given), want, DEEP)


def test_the_first_stage_trains_no_weight_of_the_rendering():
    film, given = made(SHORT), inputs()
    for render, touched in ((None, False), (given["render"], True)):
        film.zero_grad(set_to_none=True)
        film(**{**given, "render": render}).square().sum().backward()
        grads = {name: p.grad for name, p in film.condition.named_parameters()}
        assert all((grad is not None) == ("_render" not in name or touched) for name, grad in grads.items())
        assert all(bool(p.grad.abs().sum() > 0) for p in film.denoiser.blocks[0].attn1.to_q.parameters())


@torch.no_grad()
def test_added_poses_by_hand():
    """Self-attention of the first block reads each token with its frame's camera; control: cameras of other frames."""
    film, given = made("postcam.pose_added"), inputs()
    seen = []
    handle = film.denoiser.blocks[0].attn1.to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    film(**given)
    plain = made("postcam.pose_added", film.denoiser, trained=False)
    plain(**given)
    handle.remove()
    linear = film.condition.layers[0]
    of_frame = given["cameras"].flatten(2) @ linear.weight.T + linear.bias
    want = torch.cat([of_frame, of_frame], 1).repeat_interleave(16, 1)
    assert_close(seen[0] - seen[1], want, DEEP)
    assert is_far(seen[0] - seen[1], want.roll(16, 1), DEEP)


def test_new_weights_are_counted():
    """Seven projections a layer, five of one stream; as many for one softmax as for two."""
    counts = {spec: sum(p.numel() for p in made(spec).condition.parameters()) for spec in EVERY}
    encoder = 12 * 16 + 16 + 2 * (16 * 16 + 16) + 16 * DIM + DIM + 2 * DIM
    square, norms = DIM * DIM + DIM, 2 * DIM
    assert counts[SHORT] == encoder + LAYERS * (7 * square + norms) == counts[f"{SHORT},softmax=separate"]
    assert counts[f"{SHORT},render=false"] == encoder + LAYERS * (5 * square + norms)
    assert counts[f"{SHORT},pose=false"] == LAYERS * (5 * square + norms)
    assert counts["postcam.pose_added"] == LAYERS * (12 * DIM + DIM)


def test_what_is_refused():
    film, given = made(SHORT), inputs()
    for name, wrong, says in (
        ("cameras", None, "none are given"), ("cameras", given["cameras"][:, :2], r"\[2, 2, 3, 4\]"),
        ("render", given["render"][:, :, :2], "the target's frames"), ("source", given["source"][..., :4], "one grid"),
        ("render", drawn(2, 2, FRAMES, 10, 8), "no larger"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            film(**{**given, name: wrong})
    square = torch.cat([given["cameras"], drawn(2, FRAMES, 1, 4)], 2)
    assert torch.equal(film(**{**given, "cameras": square}), film(**given))  # the last row says nothing
    with pytest.raises(UserError, match="WanTransformer3DModel"):
        conditioned(diffusers.PixArtTransformer2DModel(2, 4, 2, 2, num_layers=1, sample_size=8), SHORT)
    with pytest.raises(UserError, match="has a neuron at least"):
        manyheads.parse("postcam:hidden=0")
    with pytest.raises(UserError, match="trained with a denoiser"):
        manyheads.use(wan(), SHORT).__enter__()
    film.denoiser.enable_gradient_checkpointing()
    with pytest.raises(UserError, match="checkpointing off"):
        film.train()(**given)


@torch.no_grad()
def test_a_failed_call_leaves_the_denoiser_as_it_was():
    film, given = made(SHORT), inputs()
    want, kinds = film(**given), [type(module) for module in film.denoiser.modules()]
    with pytest.raises(RuntimeError):
        film(**{**given, "encoder_hidden_states": drawn(2, 3, 15)})
    assert [type(module) for module in film.denoiser.modules()] == kinds and torch.equal(film(**given), want)


def test_a_view_condition_that_does_nothing():
    nothing, x = ViewCondition(), drawn(1, 2, 3)
    assert nothing.joined and nothing.goes_on and not nothing.rendered
    assert nothing.poses(x) is x and nothing.read(0, x, x) is x
    assert nothing.viewed(0, Stream(x, (x, x)), x, None) is None
    with pytest.raises(NotImplementedError):
        nothing.placed((x, x), (1, 2, 2), (1, 1, 1))
    none = manyheads.spec.parse("postcam:pose=false,render=false").condition(DenoiserConfig(12, 2, 2, 3, (1, 2, 2)))
    assert not list(none.parameters())
