# SPDX-License-Identifier: Apache-2.0
"""LWGANet: published counts, each range against its formula place by place in float64, images of any size."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, max_pool2d

from manyheads.domains.vision.lwganet import (
    DRFD,
    GPA,
    RANGES,
    RLA,
    SGA,
    SIZES,
    SMA,
    Block,
    LargeKernels,
    LWGANet,
    SelfAttention,
    network,
    shear,
    unshear,
)
from manyheads.errors import UserError
from manyheads.spec import parse
from tolerance import DEEP, DRAWN, FORMULA, PROJECTED, WRONG, is_close, is_far, mean_error

D = 6
COUNTS = {  # of the released classifier: parameters at 45 and 1,000 classes, of the trunk; operations at 224 x 224
    "l0": (1_717_423, 2_940_778, 1_332_098, 180_796_768),
    "l1": (5_906_975, 7_130_330, 5_193_970, 698_337_632),
    "l2": (13_040_667, 14_264_022, 11_999_982, 1_852_004_864),
}


class Task:
    """As much of a task as the network asks for."""

    dim, patch, classes = 8, 2, tuple("xyz")


def drawn(module):
    """Every parameter and statistic drawn, so that none hides by starting at 0 or 1."""
    with torch.no_grad():
        for name, x in module.state_dict().items():
            if x.is_floating_point():
                x.copy_(torch.rand_like(x) + 0.5 if "var" in name else 0.4 * torch.randn_like(x))
    return module.double().eval()


def image(height, width, channels=D, batch=2):
    return torch.randn(batch, channels, height, width, dtype=torch.float64)


def normed(x, norm):
    def of(a):
        return a[:, None, None]

    return (x - of(norm.running_mean)) / of(norm.running_var + norm.eps).sqrt() * of(norm.weight) + of(norm.bias)


def conv(x, layer, step=1):
    """A convolution with zeros around, tap by tap; dilation ``step``."""
    weight, depthwise = layer.weight, layer.groups > 1
    (kh, kw), (h, w) = weight.shape[2:], x.shape[2:]
    out = x.new_zeros(len(x), len(weight), h, w)
    for a in range(kh):
        for b in range(kw):
            part = moved(x, (a - kh // 2) * step, (b - kw // 2) * step)
            out += weight[:, 0, a, b, None, None] * part if depthwise else torch.einsum(
                "oi,bihw->bohw", weight[:, :, a, b], part
            )  # fmt: skip
    return out if layer.bias is None else out + layer.bias[:, None, None]


def moved(x, rows, columns):
    """``y[i, j] = x[i + rows, j + columns]``, zeros outside."""
    out = torch.zeros_like(x)
    for i in range(x.shape[2]):
        for j in range(x.shape[3]):
            if 0 <= i + rows < x.shape[2] and 0 <= j + columns < x.shape[3]:
                out[:, :, i, j] = x[:, :, i + rows, j + columns]
    return out


def macs(model, side):
    """Multiplications of convolutions and linear layers of one image."""
    found = []

    def count(part, inputs, out):
        each = part.weight[0].numel() if isinstance(part, nn.Conv2d) else part.in_features
        found.append(out.numel() * each)

    for part in model.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.register_forward_hook(count)
    model.eval()(torch.empty(1, 3, side, side, device="meta"))
    return sum(found)


def size_of(module):
    return sum(x.numel() for x in module.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_parameters_and_operations_are_those_of_the_released_classifier(size):
    with torch.device("meta"):
        few, many = network(size, 45), network(size)
        other = LWGANet(**SIZES[size], classes=45, ranges=("local",) * 4)
    trunk = size_of(few.stem) + size_of(few.stages)
    assert (size_of(few), size_of(many), trunk, macs(few, 224)) == COUNTS[size]
    assert size_of(other) != size_of(few)  # control


def released_shear(x):
    """As released: W numbers are cut."""
    w = x.shape[-1]
    flat = nn.functional.pad(x, (0, w)).flatten(-2)[..., :-w]
    return flat.reshape(*x.shape[:-1], 2 * w - 1)


@pytest.mark.parametrize(("h", "w"), [(4, 4), (5, 9), (9, 5), (1, 4), (4, 1), (1, 1)])
def test_shear_moves_row_i_by_i_and_is_undone(h, w):
    x = image(h, w)
    want = x.new_zeros(*x.shape[:2], h, w + h - 1)
    for i in range(h):
        want[:, :, i, i : i + w] = x[:, :, i]
    assert torch.equal(shear(x), want) and torch.equal(unshear(shear(x)), x)
    if h == w:
        assert torch.equal(released_shear(x), want)
    else:  # control: on images that are not square it cannot be viewed so, or is no shear
        with pytest.raises(RuntimeError):
            released_shear(x)


def coarse(x):
    """Every third place of the maxima of 3x3, blurred by (1, 3, 3, 1) / 8 each way."""
    b, c, h, w = x.shape
    big = torch.full_like(x, -math.inf)
    for i in range(h):
        for j in range(w):
            big[:, :, i, j] = x[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].amax((2, 3))

    def at(i, n):  # one before and two after the edge: mirrored, or repeated where there is too little
        if n < 3:
            return min(max(i, 0), n - 1)
        return -i if i < 0 else 2 * (n - 1) - i if i >= n else i

    taps = (1 / 8, 3 / 8, 3 / 8, 1 / 8)
    out = x.new_zeros(b, c, (h - 1) // 3 + 1, (w - 1) // 3 + 1)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            for p, u in enumerate(taps):
                for q, v in enumerate(taps):
                    out[:, :, i, j] += u * v * big[:, :, at(3 * i + p - 1, h), at(3 * j + q - 1, w)]
    return out


def diagonal(m, layer, columns):
    """A strip along the diagonal, without a shear: the tap that is a rows on is a columns back, or the other way."""
    kh, kw = layer.weight.shape[2:]
    out = torch.zeros_like(m)
    for a in range(kh):
        for b in range(kw):
            i, j = a - kh // 2, b - kw // 2
            out += layer.weight[:, 0, a, b, None, None] * (moved(m, i - j, j) if columns else moved(m, i, j - i))
    return out


@pytest.mark.parametrize(("h", "w"), [(13, 13), (8, 20), (16, 5), (2, 7), (1, 1)])
def test_strips_are_those_of_the_formula(h, w):
    part, x = drawn(SMA(D)), image(h, w)
    m = coarse(x)
    strips = [
        conv(m, part.tall), conv(m, part.wide), diagonal(m, part.tall_sheared, False),
        diagonal(m, part.wide_sheared, True),
    ]  # fmt: skip
    gate = normed(sum(strips), part.norm).sigmoid()
    rows, columns = (torch.arange(n) * small // n for n, small in ((h, gate.shape[2]), (w, gate.shape[3])))
    assert is_close(part.coarse(x), m, FORMULA) and is_close(part.gate(x), gate, DEEP)
    assert is_close(part(x), x * gate[:, :, rows][:, :, :, columns], DEEP)
    assert ((part.gate(x) > 0) & (part.gate(x) < 1)).all()
    if min(m.shape[2:]) > 1:  # control: the diagonals turned round
        turned = [*strips[:2], diagonal(m, part.tall_sheared, True), diagonal(m, part.wide_sheared, False)]
        assert is_far(part.gate(x), normed(sum(turned), part.norm).sigmoid(), DEEP)


def test_strips_see_one_diagonal_only():
    """A mirrored image has the mirrored gate where kernels are mirrored, but for the sheared strips."""
    part, x = drawn(SMA(D)), image(8, 8)
    part.tall_sheared.weight.data.zero_()
    part.wide_sheared.weight.data.zero_()

    def mirrored():
        before = part.gate(x)
        for layer in (part.tall, part.wide, part.tall_sheared, part.wide_sheared):
            layer.weight.data = layer.weight.data.flip(3)
        return before.flip(3), part.gate(x.flip(3))

    assert is_close(*mirrored(), DEEP)
    part.tall_sheared.weight.data.normal_()
    assert is_far(*mirrored(), DEEP)


def test_points_and_neighbourhoods_are_those_of_the_formulas():
    part, x = drawn(GPA(D, nn.GELU)), image(5, 7)
    first, norm, _, last = part.gate
    gate = conv(gelu(normed(conv(x, first), norm)), last).sigmoid()
    assert is_close(part(x), x + x * gate, DEEP) and is_far(part(x), x * gate, DEEP)
    last.weight.data.zero_()
    assert torch.equal(part(x), 1.5 * x)
    local = drawn(RLA(D, nn.ReLU))
    assert is_close(local(x), normed(conv(x, local[0]), local[1]).relu(), DEEP)


@pytest.mark.parametrize(("h", "w"), [(6, 8), (5, 7), (1, 3)])
@pytest.mark.parametrize("stage", [0, 2])
def test_the_largest_of_each_cell_is_read_and_put_back(h, w, stage):
    """A quarter of the places is left where nothing is made of them, the largest of each cell, where it was."""
    part, x = SGA(D, nn.GELU, stage).double().eval(), image(h, w)
    part.inner, part.norm = nn.Identity(), nn.Identity()
    kept = part(x) - x
    want = torch.zeros_like(x)
    for i in range(0, h, 2):
        for j in range(0, w, 2):
            cell = x[:, :, i : i + 2, j : j + 2]
            want[:, :, i : i + 2, j : j + 2] = cell * (cell == cell.amax((2, 3), keepdim=True))
    assert is_close(kept, want, FORMULA)
    if not (h % 2 or w % 2):
        assert (want != 0).double().mean() == 0.25
    assert is_far(kept, -want, FORMULA)


def test_large_kernels_are_weighed_place_by_place():
    part, x = drawn(LargeKernels(D, nn.GELU)), image(7, 6)
    h = gelu(conv(x, part.enter[0]))
    near = conv(h, part.near)
    a, b = conv(near, part.squeeze[0]), conv(conv(near, part.far, 3), part.squeeze[1])
    both = torch.cat((a, b), 1)
    weights = conv(torch.stack((both.mean(1), both.max(1).values), 1), part.select).sigmoid()
    got = part(x)
    for first, second, compare in ((0, 1, is_close), (1, 0, is_far)):
        mixed = a * weights[:, first, None] + b * weights[:, second, None]
        assert compare(got, conv(h * conv(mixed, part.widen), part.leave), DEEP)


@pytest.mark.parametrize("dim", [2, 6, 12])
def test_attention_among_places_is_softmax_by_head(dim):
    part, x = drawn(SelfAttention(dim)), image(3, 4, dim)
    heads = max(1, dim // 4)
    tokens, out = x.flatten(2).mT, []
    q, k, v = (part.qkv.weight.chunk(3)[i] for i in range(3))
    for head in range(heads):
        rows = slice(4 * head, 4 * head + 4)
        weights = ((tokens @ q[rows].T) @ (tokens @ k[rows].T).mT / 2).softmax(-1)
        out.append(weights @ (tokens @ v[rows].T))
    want = (torch.cat(out, -1) @ part.out.weight.T).mT.reshape(x.shape)
    assert part.heads == heads and is_close(part(x), want, PROJECTED) and is_far(part(x), want.flip(2), PROJECTED)


def test_downsampling_doubles_channels_and_halves_sides():
    part, x = drawn(DRFD(3, nn.GELU)), image(5, 8, 3)
    two = x.repeat_interleave(2, 1)  # each channel becomes two
    wide = conv(two, part.widen)
    low = nn.functional.pad(wide, (1, 1, 1, 1), value=-math.inf)
    largest = torch.stack([low[:, :, a : a + 5, b : b + 8] for a in range(3) for b in range(3)]).amax(0)
    a = normed(gelu(conv(wide, part.conv[0])[:, :, ::2, ::2]), part.conv[2])
    b = normed(largest[:, :, ::2, ::2], part.pool[1])
    assert part(x).shape == (2, 6, 3, 4)
    assert is_close(part(x), conv(torch.cat((a, b), 1), part.join), DEEP)
    assert is_far(part(x), conv(torch.cat((b, a), 1), part.join), DEEP)


def test_the_head_activates_what_it_makes_of_the_mean():
    model, x = drawn(LWGANet(8, (1, 1, 1, 1), nn.GELU, classes=5, features=7)), image(40, 32, 3)
    mean = model.stage_maps(x)[-1].mean((2, 3))
    last = model.head[4]
    want = gelu(mean @ model.head[1].weight[:, :, 0, 0].T) @ last.weight.T + last.bias
    assert is_close(model(x), want, DEEP) and model(x).shape == (2, 5)
    fresh = LWGANet(8, (1, 1, 1, 1), nn.GELU, classes=5)
    weight = fresh.stages[3][1].mlp[0].weight
    assert float(weight.std().detach()) == pytest.approx(0.02, rel=0.05) and not fresh.head[4].bias.any()


def test_norms_of_the_global_range_by_stage():
    """Around the sum in stages 1, 2 and 4, around attention alone in stage 3; the last has no order of places."""
    x = image(4, 4)
    for stage in range(4):
        part = drawn(SGA(D, nn.GELU, stage))
        values, at = max_pool2d(x, 2, return_indices=True)

        def back(y, at=at):
            return nn.functional.max_unpool2d(y, at, 2)

        if stage == 2:
            want = x + back(normed(part.inner(values), part.norm))
        else:
            want = normed(x + (part.inner(x) if stage == 3 else back(part.inner(values))), part.norm)
        assert is_close(part(x), want, DEEP)
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))

        def turned(y, order=order):
            return y.flatten(2)[:, :, order].view(y.shape)

        assert (is_close if stage == 3 else is_far)(part(turned(x)), turned(part(x)), DEEP)


def test_a_block_is_the_identity_where_its_mlp_says_nothing():
    block, x = Block(16, 24, 0, RANGES, nn.GELU, 0.0).double(), image(6, 6, 16)
    assert is_far(block(x), x, FORMULA)
    block.mlp[-1].weight.data.zero_()
    assert torch.equal(block(x), x)


@pytest.mark.parametrize(("only", "without"), [("local", "none"), ("all", "medium"), ("all", "none")])
def test_groups_have_the_ranges_that_are_asked_for(only, without):
    recipe = parse(f"lwganet:only={only},without={without}")
    model = drawn(recipe.build(Task(), 12))
    block, x = model.stages[1][1], image(6, 6, 16)
    kinds = {"point": GPA, "local": RLA, "medium": SMA, "global": SGA}
    want = [
        nn.Identity if name == without else kinds[name if only == "all" else only] for name in RANGES
    ]  # fmt: skip
    assert [type(part) for part in block.groups] == want and block.mlp[0].out_channels == 24
    y = torch.cat([part(x[:, 4 * i : 4 * i + 4]) for i, part in enumerate(block.groups)], 1)
    mixed = conv(gelu(normed(conv(y, block.mlp[0]), block.mlp[1])), block.mlp[3])
    assert is_close(block(x), x + normed(mixed, block.norm), DEEP) and is_far(block(x), x + mixed, DEEP)
    pictures = recipe.pictures(model.float(), {"inputs": torch.rand(2, 3, 16, 20)})
    assert len(pictures) == (only == "all" and without == "none")


def test_drop_path_leaves_out_whole_samples_and_grows():
    with torch.device("meta"):
        drops = [part.drop for part in network("l1").modules() if isinstance(part, Block)]
    assert drops == pytest.approx([0.1 * i / 8 for i in range(9)])
    block = Block(8, 16, 3, RANGES, nn.ReLU, 0.25).train()
    block.norm = nn.Identity()
    x = torch.ones(2000, 8, 1, 1)
    with torch.no_grad():
        kept = (block(x) != x).flatten(1).any(1).double()
    deviation = (0.75 * 0.25) ** 0.5
    assert mean_error(kept, 0.75, deviation) < DRAWN and mean_error(kept, 0.5, deviation) > WRONG
    assert torch.equal(block.eval()(x), block(x))


@pytest.mark.parametrize(("h", "w"), [(96, 64), (33, 61), (17, 8), (3, 5), (1, 1)])
def test_maps_of_images_of_any_size(h, w):
    """Four maps, each with its own norm; one image of a batch does not change another's."""
    torch.manual_seed(0)
    model = drawn(LWGANet(16, (1, 1, 1, 1), nn.GELU, maps=(0, 1, 2, 3)))
    assert (model.channels, model.strides) == ([16, 32, 64, 128], [4, 8, 16, 32])
    x = image(h, w, 3)
    maps, raw = model(x), model.stage_maps(x)
    rows, columns = max(1, h // 4), max(1, w // 4)
    for i, (one, before) in enumerate(zip(maps, raw, strict=True)):
        assert one.shape == (2, model.channels[i], rows, columns) and one.isfinite().all()
        assert is_close(one, normed(before, model.norms[i]), DEEP) and is_far(one, before, DEEP)
        rows, columns = -(-rows // 2), -(-columns // 2)
    alone = model(x[:1])
    assert all(is_close(a[:1], b, DEEP) for a, b in zip(maps, alone, strict=True))
    some = LWGANet(16, (1, 1, 1, 1), nn.GELU, maps=(1, 3)).eval()
    assert [one.shape[1] for one in some(x.float())] == some.channels == [32, 128] and some.strides == [8, 32]


def test_what_cannot_be_is_refused():
    for dim in (4, 18):
        with pytest.raises(UserError, match="multiple of 4"):
            LWGANet(dim, (1, 1, 1, 1), nn.GELU)
    with pytest.raises(UserError, match="one of only and without"):
        parse("lwganet:only=local,without=point")
