# SPDX-License-Identifier: Apache-2.0
"""The decoder of saliency maps: its layers by loops, where its weights come from, and what is refused."""

import pytest
import torch
from safetensors.torch import save_file

from manyheads import UserError
from manyheads.models.saliency import FILE, SaliencyDecoder, load_decoder, normalised
from tolerance import CALL, CLOSE, assert_close, is_far, within

WIDTHS = (6, 5, 4, 3)
THREE = within(torch.float64, 3 * CALL)


def decoder(seed=0):
    torch.manual_seed(seed)
    made = SaliencyDecoder(WIDTHS).double().eval()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.05, 0.2)
            torch.nn.init.normal_(module.bias)
    return made


def doubled(x, weight, bias):
    """A transposed convolution of 4 x 4 by loops: every entry adds its kernel at twice its place, less one."""
    height, width = x.shape[1:]
    out = bias[:, None, None] + torch.zeros(weight.shape[1], 2 * height + 2, 2 * width + 2, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            out[:, 2 * i : 2 * i + 4, 2 * j : 2 * j + 4] += torch.einsum("c,cdyx->dyx", x[:, i, j], weight)
    return out[:, 1:-1, 1:-1]


@torch.no_grad()
def test_the_map_is_the_formula():
    made, grid = decoder(), (2, 3)
    patches = torch.randn(1, 6, WIDTHS[0], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = patches[0].T.reshape(-1, *grid)
    for i in (1, 2, 3):
        up, norm = getattr(made, f"upconv{i}"), getattr(made, f"bn{i}")
        x = doubled(x, up.weight, up.bias)
        x = (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        x = (x * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
    want = (torch.einsum("c,cyx->yx", made.final_conv.weight[0, :, 0, 0], x) + made.final_conv.bias).sigmoid()
    got = made(patches, grid, (16, 24))
    assert got.shape == (1, 16, 24)
    assert_close(got[0], want, THREE)
    assert is_far(made(patches.flip(1), grid, (16, 24))[0], want, THREE)
    assert made(patches, grid, (8, 8)).shape == (1, 8, 8)


def test_loading(tmp_path):
    made = decoder()
    with pytest.raises(UserError, match="tuned for saliency"):
        load_decoder(tmp_path)
    weights = {f"decoder.{k}": v.float() for k, v in made.state_dict().items() if "num_batches" not in k}
    save_file(weights, tmp_path / FILE)
    found = load_decoder(tmp_path)
    assert not found.training
    for name, value in found.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, weights[f"decoder.{name}"])
    save_file(weights | {"decoder.more": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(UserError, match="more does not fit"):
        load_decoder(tmp_path)


def test_what_an_encoder_reads():
    images = torch.full((1, 3, 2, 2), 0.5)
    want = [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
    assert_close(normalised(images)[0, :, 0, 0], want, CLOSE, unit=1.0)
