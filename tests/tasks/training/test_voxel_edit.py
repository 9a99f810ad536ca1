# SPDX-License-Identifier: Apache-2.0
"""Editors of voxels: their figures by hand, arms alike but for the source, costs from formulas, and the recipe."""

import json
import math
from dataclasses import replace

import pytest
import torch
from tests.tolerance import DRAWN, assert_close, is_far, mean_error, nearly, spread_error

from manyheads.data.voxels import INSTRUCTIONS, draw, edited, held_out, spread, targets
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.experiment.subjects import CausalLM, Trainable
from manyheads.experiment.task import RunContext

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.models.rectified import fitted
from manyheads.models.voxels import EditorConfig, VoxelEditor, noisy
from manyheads.recipes import native3d_edit as recipe
from manyheads.report import voxels as picture
from manyheads.tasks.training._voxel_scores import chamfer, followed, iou, judge
from manyheads.tasks.training.voxel_edit import VoxelEdit
from manyheads.tasks.training.voxel_edit_cost import VoxelEditCost, operations
from manyheads.training import train_flow

TINY = {"dim": 12, "heads": 2, "layers": 1, "denoising": 2}
ARMS = (
    Arm("none"), Arm("tokens", "native3d_edit"), Arm("cross", "native3d_edit.cross_attention"),
    Arm("equal", "native3d_edit.cross_attention", options={"fitted": True}),
    Arm("channels", "native3d_edit.channels"), Arm("copied", options={"copies": True}),
)  # fmt: skip


def context(arms=ARMS, seeds=(0,)):
    return RunContext(Trainable(), arms, seeds=seeds)


@pytest.fixture(scope="module")
def edits():
    return draw(16, 8, torch.Generator().manual_seed(1))


def test_the_exact_result_has_full_marks_and_the_source_has_none_for_the_edit(edits):
    for each in judge(edits.target, edits):
        assert each == {"edited_iou": 1, "kept_iou": 1, "kept_chamfer": 0, "followed": 1, "exact": 1}
    for each in judge(edits.source, edits):
        assert each["edited_iou"] < 1 and each["followed"] == each["exact"] == 0
        assert each["kept_iou"] == 1 and each["kept_chamfer"] == 0
    wrong = targets(edits.source)[torch.arange(16), (edits.instruction + 1) % 4]
    assert not followed(wrong, edits).any()


def test_regions_part_what_the_edit_changes_from_what_it_keeps(edits):
    """A voxel too many far from the edit counts against what is kept, one within it against what is edited."""
    changed = edits.source ^ edits.target
    far = ~spread(changed) & ~edits.target
    near = changed & ~edits.target
    for i in range(16):
        for region, hurt, spared in ((far, "kept_iou", "edited_iou"), (near, "edited_iou", "kept_iou")):
            if region[i].any():
                out = edits.target.clone()
                out[(i, *region[i].nonzero()[0].tolist())] = True
                each = list(judge(out, edits))[i]
                assert each[hurt] < 1 and each[spared] == 1 and each["exact"] == 0


def test_iou_and_chamfer_by_hand():
    a, b = torch.zeros(2, 6, 6, 6, dtype=torch.bool).unbind()
    a[0, 0, 0] = a[0, 0, 1] = b[0, 0, 1] = b[0, 4, 4] = True
    everywhere = torch.ones(1, 6, 6, 6, dtype=torch.bool)
    assert iou(a[None], b[None], everywhere).tolist() == nearly([1 / 3], torch.float32)
    assert iou(a[None], b[None], ~everywhere).tolist() == [1.0]
    assert chamfer(a, b) == nearly(((1 + 0) / 2 + (0 + 5) / 2) / 2, torch.float32)
    assert chamfer(a, a) == 0 and chamfer(a & ~a, b & ~b) == 0
    assert chamfer(a, b & ~b) == nearly(math.sqrt(3) * 6)


def test_a_tie_is_not_followed(edits):
    """Half of the way from the source to the result is as near to one as to the other."""
    one = replace_first(edits, "add")
    out = one.source.clone()
    out[0][(one.source ^ one.target)[0].nonzero()[:4].unbind(1)] = True
    assert not followed(out, one)[0]
    out[0][(one.source ^ one.target)[0].nonzero()[:5].unbind(1)] = True
    assert followed(out, one)[0]


def replace_first(edits, name):
    told = edits.instruction.clone()
    told[0] = INSTRUCTIONS.index(name)
    target = edits.target.clone()
    target[0] = edited(edits.source[:1], name)[0]
    return type(edits)(edits.source, told, target)


def test_noisy_targets_and_their_velocity():
    """On the line from target to noise, levels logit-normal; the source is never noisy and nothing else tells it."""
    edits = draw(600, 8, torch.Generator().manual_seed(2))
    given = noisy(edits, torch.Generator().manual_seed(3))
    clean, sigma = edits.target[:, None].float() * 2 - 1, (given.time / 1000).view(-1, 1, 1, 1, 1)
    assert_close(given.latents - sigma * given.velocity, clean)
    assert is_far(given.latents - (1 - sigma) * given.velocity, clean)
    assert_close(given.source, edits.source[:, None].float() * 2 - 1)
    level = torch.logit(given.time.double() / 1000)
    assert mean_error(level, 0.0, 1.0) < DRAWN and spread_error(float(level.std()), 1.0, 600) < DRAWN


def test_a_rectified_flow_is_followed_to_its_end(edits):
    """A velocity that is right at every point ends at the target, from any noise; control: half of it."""
    editor = VoxelEditor(EditorConfig(dim=12, layers=1, strategy=""))
    clean = edits.target[:, None].float() * 2 - 1
    noise = torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(4))

    def right(x, source, time, instruction, share=1.0):
        return share * (x - clean) / (time / 1000).view(-1, 1, 1, 1, 1)

    editor.forward = right
    assert torch.equal(editor.edited(edits.source, edits.instruction, noise, 5), edits.target)
    editor.forward = lambda *given: right(*given, share=0.3)
    assert not torch.equal(editor.edited(edits.source, edits.instruction, noise, 5), edits.target)


def test_arms_of_a_seed_differ_in_the_source_alone():
    task, run = VoxelEdit(**TINY), context()
    plain, tokens, cross = (task.fresh(run, arm, 0) for arm in ARMS[:3])
    held = plain.state_dict()
    for other in (tokens, cross):
        assert all(torch.equal(held[name], other.state_dict()[name]) for name in held)
    again, next_seed = task.fresh(run, ARMS[0], 0), task.fresh(run, ARMS[0], 1)
    assert all(torch.equal(x, y) for x, y in zip(plain.parameters(), again.parameters(), strict=True))
    assert is_far(next_seed.words.weight, plain.words.weight)


def test_a_fitted_arm_has_as_many_parameters():
    task = VoxelEdit(**{**TINY, "dim": 24})
    counts = {arm.name: VoxelEditor(task.config(arm)).parameters_held for arm in ARMS[:5]}
    assert counts["tokens"] == counts["none"] + 2 * 24 and counts["cross"] == counts["none"] + 4 * 24**2 + 6 * 24
    assert abs(counts["equal"] - counts["none"]) <= 2 * 24 + 1 < counts["channels"] - counts["none"]
    with pytest.raises(UserError, match="more than 10 parameters"):
        fitted(VoxelEditor, EditorConfig(dim=12, layers=1), 10)


def test_rows_of_a_run_and_objects_that_no_training_saw():
    task = VoxelEdit(**TINY, steps=2, batch=4, samples=8, rates=(1e-3, 1e-2), tune_steps=1)
    run = context(seeds=(0, 1))
    task.guard(run)
    units = task.units(run)
    assert [unit.cost for unit in units] == [4 * (2 * 1 + 2 * 2)] * 5 + [1.0]
    done = []
    run.advance = done.append
    rows = {arm.key: list(task.measure(run, unit)) for arm, unit in zip(ARMS, units, strict=True)}
    assert sum(done) == sum(unit.cost for unit in units[:5])
    for key, found in rows.items():
        names = [row.metric for row in found]
        assert names.count("edited_iou") == 16 and names.count("training_loss") == (0 if key == "copied" else 2)
        assert {row.seed for row in found} == {0, 1}
    copied = [row.value for row in rows["copied"] if row.metric == "kept_iou"]
    assert copied == [1.0] * 16
    judged = task.judged(run)
    assert held_out(judged.source).all() and judged.instruction.bincount().tolist() == [2] * 4
    assert torch.equal(judged.source, task.judged(context()).source)
    about = next(row.about for row in rows["tokens"] if row.metric == "training_loss")
    assert about["rate"] in (1e-3, 1e-2)


def test_more_steps_for_an_arm():
    task = VoxelEdit(**TINY, steps=2, batch=4, samples=4)
    arm = Arm("longer", "native3d_edit", options={"times": 2})
    run, done = context((arm,)), []
    run.advance = done.append
    list(task.measure(run, task.units(run)[0]))
    assert len(done) == 4 and sum(done) == task.units(run)[0].cost


@pytest.mark.parametrize("spec", ["", "native3d_edit", "native3d_edit.cross_attention", "native3d_edit.channels"])
def test_operations_from_the_formula(spec):
    """Joined tokens quadruple self-attention; attention to the source doubles it; channels leave it."""
    dim, layers, tokens = 24, 2, 64
    editor = VoxelEditor(EditorConfig(dim=dim, layers=layers, strategy=spec))
    own = 2 * tokens if spec == "native3d_edit" else tokens
    pairs = own * own + own * 1 + (tokens * tokens if "cross" in spec else 0)  # to themselves, to text, to the source
    counted = operations(editor)
    assert counted.attention == layers * 4 * pairs * dim
    assert counted.products > counted.attention


def test_costs_are_of_arms_with_an_editor():
    task = VoxelEditCost(**TINY, edits=2, rounds=2)
    run = context()
    rows = list(task.measure(run, task.units(run)[0]))
    assert {row.arm for row in rows} == {arm.key for arm in ARMS[:5]}
    seconds = [row for row in rows if row.metric == "seconds"]
    assert len(seconds) == 10 and all(row.value > 0 for row in seconds)


def test_wrong_arms_and_sizes_are_refused():
    with pytest.raises(UserError, match="sag does not act"):
        VoxelEdit().guard(context((Arm("sag", "sag"),)))
    for wrong in ({"samples": 6}, {"rates": ()}, {"steps": 0}):
        with pytest.raises(UserError):
            VoxelEdit(**wrong)
    with pytest.raises(UserError, match="multiple of six"):
        VoxelEditor(EditorConfig(dim=16))
    strategy = Arm("x", "native3d_edit").strategy
    assert Trainable().unsupported_reason(strategy) is None
    assert "recipes.native3d_edit" in (CausalLM("default").unsupported_reason(strategy) or "")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("editor")
    assert recipe.main(["--out", str(folder), "--smoke", "--dim", "12", "--layers", "1"]) == 0
    return folder


def test_the_recipe_leaves_an_editor(made, edits):
    about = json.loads((made / "results.json").read_text())
    assert about["steps"] == 3 and set(about["judged"]) >= {"edited_iou", "followed"}
    editor = VoxelEditor.load(made)
    both = editor.edit(edits.source[:2], ["hollow", "grow"], steps=2, seed=3)
    assert both.shape == (2, 8, 8, 8) and both.dtype == torch.bool
    assert torch.equal(both, VoxelEditor.load(made).edit(edits.source[:2], ["hollow", "grow"], steps=2, seed=3))
    assert not torch.equal(both[0], editor.edit(edits.source[0], "hollow", steps=2, seed=4))  # another seed
    assert editor.edit(edits.source[0], "hollow", steps=2, seed=3).shape == (8, 8, 8)


def test_what_an_editor_refuses(made, edits, tmp_path):
    editor = VoxelEditor.load(made)
    with pytest.raises(UserError, match="not paint"):
        editor.edit(edits.source[0], "paint")
    with pytest.raises(UserError, match="1 are given for 2 objects"):
        editor.edit(edits.source[:2], ["add"])
    with pytest.raises(UserError, match="8 voxels a side"):
        editor.edit(torch.zeros(6, 6, 6, dtype=torch.bool), "add")
    with pytest.raises(UserError, match="has no editor: train one"):
        VoxelEditor.load(tmp_path)


def test_a_few_steps_teach_something(edits):
    """The loss falls on what it is trained on; control: without training it stays."""
    torch.manual_seed(0)
    editor = VoxelEditor(EditorConfig(dim=24, layers=1))
    given = noisy(edits, torch.Generator().manual_seed(0))
    before = float(editor.loss(given).detach())
    frozen = replace(editor.config)
    train_flow(editor, lambda _: given, 25, 1e-2)
    assert float(editor.loss(given).detach()) < 0.8 * before and editor.config == frozen


def test_the_picture(edits, tmp_path):
    out = tmp_path / "edits.png"
    picture.save(out, ["add"], edits.source[:1], edits.target[:1], edits.target[:1])
    assert out.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="one size"):
        picture.save(out, ["add"], edits.source, edits.target, edits.target)
    with pytest.raises(UserError, match="a picture is"):
        picture.save(tmp_path / "a.txt", ["add"], *[edits.source[:1]] * 3)
