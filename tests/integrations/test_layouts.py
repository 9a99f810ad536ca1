# SPDX-License-Identifier: Apache-2.0
"""Grids of tokens and timesteps by class, from configs and inputs that are made up; arguments by name."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.call import Layout
from manyheads.integrations.layouts import arguments, layout_of, timestep_of


def denoiser(name, **config):
    made = type(name, (torch.nn.Module,), {})()
    made.config = SimpleNamespace(**config)
    return made


TEXT = {"encoder_hidden_states": torch.zeros(2, 7, 4)}
IDS = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 2, 4], [0, 0, 3]])


@pytest.mark.parametrize(
    ("name", "config", "given", "want"),
    [
        ("DiTTransformer2DModel", {"patch_size": 2}, {"hidden_states": (2, 4, 8, 12)}, Layout(1, 4, 6)),
        ("PixArtTransformer2DModel", {"patch_size": 4}, {"hidden_states": (2, 4, 9, 12)}, Layout(1, 2, 3)),
        ("SD3Transformer2DModel", {"patch_size": 2}, {"hidden_states": (2, 4, 8, 12)}, Layout(1, 4, 6, 7, False)),
        ("FluxTransformer2DModel", {}, {"hidden_states": (2, 15, 4), "img_ids": IDS}, Layout(1, 3, 5, 7, True)),
        ("FluxTransformer2DModel", {}, {"hidden_states": (2, 15, 4), "img_ids": IDS[None]}, Layout(1, 3, 5, 7, True)),
        ("WanTransformer3DModel", {"patch_size": (2, 4, 1)}, {"hidden_states": (2, 4, 6, 8, 12)}, Layout(3, 2, 12)),
        ("LatteTransformer3DModel", {"patch_size": 2}, {"hidden_states": (2, 4, 6, 8, 12)}, Layout(6, 4, 6)),
        ("HunyuanVideoTransformer3DModel", {"patch_size": 2, "patch_size_t": 3}, {"hidden_states": (2, 4, 6, 8, 12)},
         Layout(2, 4, 6, 7, False)),
        ("CogVideoXTransformer3DModel", {"patch_size": 2, "patch_size_t": None}, {"hidden_states": (2, 3, 4, 8, 12)},
         Layout(3, 4, 6, 7, True)),
        ("CogVideoXTransformer3DModel", {"patch_size": 2, "patch_size_t": 2}, {"hidden_states": (2, 6, 4, 8, 12)},
         Layout(3, 4, 6, 7, True)),
        ("LTXVideoTransformer3DModel", {}, {"num_frames": 3, "height": 4, "width": 5}, Layout(3, 4, 5)),
        ("UNet2DConditionModel", {}, {"sample": (2, 4, 8, 12)}, Layout(1, 8, 12)),
        ("UNet2DModel", {}, {"sample": (2, 4, 8, 12)}, Layout(1, 8, 12)),
        ("Unknown", {"patch_size": 2}, {"hidden_states": (2, 4, 8, 12)}, None),
        ("DiTTransformer2DModel", {}, {"hidden_states": (2, 4, 8, 12)}, None),
        ("DiTTransformer2DModel", {"patch_size": 2}, {}, None),
        ("LTXVideoTransformer3DModel", {}, {"num_frames": 3, "height": 4, "width": None}, None),
        ("LTXVideoTransformer3DModel", {}, {"num_frames": 3.0, "height": 4, "width": 5}, None),
    ],
)  # fmt: skip
def test_layouts(name, config, given, want):
    inputs = {key: torch.zeros(x) if isinstance(x, tuple) else x for key, x in given.items()}
    assert layout_of(denoiser(name, **config), {**inputs, **TEXT}) == want
    if want is not None and want.text:  # without text in the inputs there is none in the sequence
        alone = layout_of(denoiser(name, **config), inputs)
        assert alone == Layout(want.frames, want.height, want.width, 0, want.text_first)


def test_timesteps_as_the_scheduler_counts():
    """A share of the training steps where the class is given one; of tokens that differ the noisiest."""
    scheduler = SimpleNamespace(config=SimpleNamespace(num_train_timesteps=500))
    flux, dit = denoiser("FluxTransformer2DModel"), denoiser("DiTTransformer2DModel")
    some = {"timestep": torch.tensor([0.25, 0.75, 0.5])}
    assert timestep_of(flux, some, scheduler) == 375.0 and timestep_of(dit, some, scheduler) == 0.75
    assert timestep_of(flux, some, None) == 0.75 and timestep_of(denoiser("Unknown"), some, scheduler) == 0.75
    for empty in (SimpleNamespace(), SimpleNamespace(num_train_timesteps=None), SimpleNamespace(num_train_timesteps=0)):
        assert timestep_of(flux, some, SimpleNamespace(config=empty)) == 0.75
    assert timestep_of(dit, {"timestep": 7}, scheduler) == 7.0 and timestep_of(dit, {}, scheduler) == 0.0
    assert timestep_of(dit, {"timestep": None}, scheduler) == 0.0


def test_frames_grids_and_places():
    layout = Layout(3, 5, 4, text=2, text_first=True)
    assert layout.tokens == 60 and layout.grid(20) == (5, 4) and layout.grid(6) == (3, 2) and layout.grid(2) == (2, 1)
    assert layout.grid(1) == (1, 1) and layout.grid(0) is None and layout.grid(21) is None and layout.grid(19) is None
    assert layout.image(60) == slice(0, 60) and layout.image(62) == slice(2, 62)
    assert Layout(3, 5, 4, text=2).image(62) == slice(0, 60)


class Owner:
    def forward(self, x, y=2, *rest, z=3, **more):
        pass

    def other(self, a, b=5):
        pass


def test_arguments_by_name():
    owner = Owner()
    assert arguments(owner, (1,), {}) == {"x": 1, "y": 2, "rest": (), "z": 3, "more": {}}
    assert arguments(owner, (1, 4, 6), {"z": 7, "w": 8}) == {"x": 1, "y": 4, "rest": (6,), "z": 7, "more": {"w": 8}}
    assert arguments(owner, (), {"a": 9}, Owner.other) == {"a": 9, "b": 5}
    with pytest.raises(TypeError):
        arguments(owner, (), {})
