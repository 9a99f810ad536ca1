# SPDX-License-Identifier: Apache-2.0
"""Denoisers of avatars: figures by hand, arms alike but for what is inserted, what they are told, and the recipe."""

import json

import pytest
import torch
from tests.tolerance import DRAWN, assert_close, is_far, mean_error, spread_error

from manyheads.data.avatars import Clip, chest, covered, draw, keypoints, layers, painted, regions
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.experiment.subjects import CausalLM, Trainable
from manyheads.experiment.task import RunContext

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.calls.human_priors import movement_map
from manyheads.integrations.stage_blocks import Denoised
from manyheads.models.avatars import AvatarConfig, AvatarModel, hand_clarity, noisy, shown
from manyheads.models.rectified import fitted
from manyheads.recipes import cyberhost as recipe
from manyheads.tasks.training._avatar_scores import candidates, found_keypoints, judge, true_keypoints
from manyheads.tasks.training.avatar_video import AvatarVideo
from manyheads.training import train_flow

SPEC = "cyberhost:spatial=8,temporal=4"
TINY = {"dim": 12, "heads": 2, "layers": 1, "denoising": 2, "frames": 2}
ARMS = (
    Arm("plain", options={"fitted": SPEC}), Arm("whole", SPEC), Arm("free", f"{SPEC},mask=false"),
    Arm("bare", SPEC, options={"without": ("movement", "clarity", "pose", "local")}),
    Arm("still", options={"copies": "reference"}), Arm("truth", options={"copies": "truth"}),
)  # fmt: skip


def context(arms=ARMS, seeds=(0,)):
    return RunContext(Trainable(), arms, seeds=seeds)


@pytest.fixture(scope="module")
def clip():
    return draw(6, 2, 16, torch.Generator().manual_seed(1), sharp=True)


def model(**changes):
    torch.manual_seed(0)
    return AvatarModel(AvatarConfig(**{"dim": 12, "layers": 1, "strategy": SPEC, **changes}))


def test_the_right_video_has_no_error_and_its_keypoints_are_found(clip):
    """To half of a step of the grid; the reference's hands are elsewhere."""
    for each in judge(clip.video, None, clip):
        assert each["hand_rmse"] == each["face_rmse"] == each["rest_rmse"] == 0 and each["hand_keypoints"] < 0.35
        assert "mask_iou" not in each
    still = list(judge(clip.reference[:, None].expand_as(clip.video), None, clip))
    assert sum(each["hand_keypoints"] for each in still) / 6 > 1 and min(each["hand_rmse"] for each in still) > 0


def test_keypoints_are_those_of_what_is_shown(clip):
    """Frames of another signal: what is found is where their hands are; control: where the clip's are."""
    known = candidates(clip)
    other = draw(6, 2, 16, torch.Generator().manual_seed(2), sharp=True)
    finger = clip.avatar.finger[:, None].expand(6, 2)
    video = painted(layers(other.pose, finger, 16), clip.avatar.colours[:, None])
    moved = Clip(video, other.signal, clip.avatar, other.pose, clip.reference, clip.reference_pose)
    found = found_keypoints(video, known)
    assert float((found - true_keypoints(moved, 16)).norm(dim=-1).mean()) < 0.3
    assert float((found - true_keypoints(clip, 16)).norm(dim=-1).mean()) > 1


def test_errors_are_of_their_regions(clip):
    box = regions(clip.pose, clip.avatar.finger[:, None].expand(6, 2), 16)
    hand, face = (covered(box[name], 16, 16)[:, :, None] for name in ("hand", "face"))
    for at, name in ((hand, "hand_rmse"), (face & ~hand, "face_rmse"), (~(hand | face), "rest_rmse")):
        for each in judge(clip.video + 0.2 * at, None, clip):
            figures = [each["hand_rmse"], each["face_rmse"], each["rest_rmse"]]
            assert each[name] == pytest.approx(0.1, rel=1e-5) and sorted(figures)[:2] == [0, 0]
    right = covered(box["hand"], 16, 8).float()
    assert [each["mask_iou"] for each in judge(clip.video, right, clip)] == [1.0] * 6
    assert [each["mask_iou"] for each in judge(clip.video, 1 - right, clip)] == [0.0] * 6


def test_what_a_denoiser_is_told(clip):
    """In training a box and a score of the clip, in inference neither; crops are of the reference."""
    given = shown(clip)
    assert given.clarity.tolist() == [0.25] * 6 and given.crops[0].shape == (6, 1, 3, 8, 8)
    assert given.crops[1].shape == (6, 2, 3, 8, 8)
    assert torch.equal(given.movement, movement_map(chest(clip.pose, 16), torch.full((6,), 1.25), 16))
    changed = shown(Clip(clip.video * 0, clip.signal, clip.avatar, clip.pose, clip.reference, clip.reference_pose))
    assert torch.equal(changed.crops[1], given.crops[1])  # nothing of the video itself is told
    blurred = draw(200, 2, 16, torch.Generator().manual_seed(3))
    sharp = draw(200, 2, 16, torch.Generator().manual_seed(3), sharp=True)
    change = hand_clarity(sharp) - hand_clarity(blurred)
    assert (change[change != 0] > 0).float().mean() > 0.9 and 60 < int((change != 0).sum()) < 140
    assert float((hand_clarity(sharp) < 0.25).float().mean()) == pytest.approx(0.9, abs=0.07)


def test_noisy_clips_and_their_velocity():
    clip = draw(300, 2, 16, torch.Generator().manual_seed(4))
    given = noisy(clip, 2, torch.Generator().manual_seed(5))
    clean, sigma = clip.video.transpose(1, 2), (given.time / 1000).view(-1, 1, 1, 1, 1)
    assert_close(given.latents - sigma * given.velocity, clean)
    assert is_far(given.latents - (1 - sigma) * given.velocity, clean)
    level = torch.logit(given.time.double() / 1000)
    assert mean_error(level, 0.0, 1.0) < DRAWN and spread_error(float(level.std()), 1.0, 300) < DRAWN
    assert not given.counted[given.time >= 500].any()
    assert given.counted[given.time < 500].mean() == pytest.approx(0.5, abs=0.2)
    assert given.heat.shape == (300, 2, 6, 8, 8) and given.hand.shape == (300, 2, 8, 8)
    points = keypoints(clip.pose, clip.avatar.finger[:, None].expand(300, 2), 16)
    y, x = given.heat.flatten(3).argmax(-1) // 8, given.heat.flatten(3).argmax(-1) % 8
    inside = ((points > 0) & (points < 16)).all(-1)
    assert ((torch.stack([x, y], -1) * 2 + 1 - points).abs().amax(-1)[inside] <= 1.001).all()


def test_priors_are_read_once_they_are_trained(clip):
    """Each prior changes nothing at first, and something when its weights are; one that is left out is not there."""
    plain = model()
    noise = torch.randn(6, 3, 2, 16, 16, generator=torch.Generator().manual_seed(6))
    given, time = shown(clip), torch.full((6,), 500.0)
    changed = {
        "movement": given._replace(movement=1 - given.movement), "clarity": given._replace(clarity=given.clarity + 1),
        "pose": given._replace(skeleton=1 - given.skeleton),
    }  # fmt: skip
    with torch.no_grad():
        for name, other in changed.items():
            assert torch.equal(plain(noise, time, other).sample, plain(noise, time, given).sample)
            getattr(plain, name).second.weight.add_(0.1)
            assert is_far(plain(noise, time, other).sample, plain(noise, time, given).sample)
            assert getattr(model(**{name: False}), name) is None
        other = given._replace(signal=1 - given.signal)
        assert is_far(plain(noise, time, other).sample, plain(noise, time, given).sample)


def test_a_flow_is_followed_to_its_end(clip):
    """A velocity that is right at every point ends at the video, from any noise; control: half of it."""
    made, clean = model(strategy=""), clip.video.transpose(1, 2)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))

    def right(x, time, given, share=1.0):
        return Denoised(share * (x - clean) / (time / 1000).view(-1, 1, 1, 1, 1), [])

    made.forward = right
    video, mask = made.animated(shown(clip), noise, 5)
    assert_close(video, clip.video)
    assert mask is None
    made.forward = lambda *given: right(*given, share=0.5)
    assert is_far(made.animated(shown(clip), noise, 5)[0], clip.video)


def test_arms_have_as_many_parameters_and_the_same_first_weights():
    task, run = AvatarVideo(**TINY), context()
    plain, whole, free, bare = (task.fresh(run, arm, 0) for arm in ARMS[:4])
    assert abs(plain.parameters_held - whole.parameters_held) <= 2 * 12 + 1
    held = whole.denoiser.denoiser.state_dict()
    assert all(torch.equal(held[name], x) for name, x in free.denoiser.denoiser.state_dict().items())
    assert bare.movement is bare.pose is bare.clarity is None and not bare.config.local
    again = task.fresh(run, ARMS[1], 0)
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="more than 10 parameters"):
        fitted(AvatarModel, AvatarConfig(dim=12, layers=1, strategy=SPEC), 10)


def test_rows_of_a_run():
    task = AvatarVideo(**TINY, steps=2, batch=2, samples=3, rates=(1e-3, 1e-2), tune_steps=1)
    run, done = context(seeds=(0, 1)), []
    run.advance = done.append
    task.guard(run)
    units = task.units(run)
    rows = {arm.key: list(task.measure(run, unit)) for arm, unit in zip(ARMS, units, strict=True)}
    assert sum(done) == sum(unit.cost for unit in units[:4]) and [unit.cost for unit in units[4:]] == [1.0, 1.0]
    for key, found in rows.items():
        names = [row.metric for row in found]
        trained = key not in ("still", "truth")
        assert names.count("hand_keypoints") == 6 and names.count("training_loss") == (2 if trained else 0)
        assert names.count("mask_iou") == (6 if key in ("whole", "bare") else 0)
    assert [row.value for row in rows["truth"] if row.metric == "hand_rmse"] == [0.0] * 6
    assert torch.equal(task.judged(run).video, task.judged(context()).video)


def test_wrong_arms_and_sizes_are_refused():
    with pytest.raises(UserError, match="sag does not act"):
        AvatarVideo().guard(context((Arm("sag", "sag"),)))
    with pytest.raises(UserError, match="not audio"):
        AvatarVideo().guard(context((Arm("x", options={"without": ("audio",)}),)))
    for wrong in ({"samples": 0}, {"rates": ()}, {"steps": 0}):
        with pytest.raises(UserError):
            AvatarVideo(**wrong)
    with pytest.raises(UserError, match="multiple of six"):
        AvatarModel(AvatarConfig(dim=16))
    strategy = Arm("x", SPEC).strategy
    assert Trainable().unsupported_reason(strategy) is None
    assert "recipes.cyberhost" in (CausalLM("default").unsupported_reason(strategy) or "")


def test_a_few_steps_teach_something(clip):
    made = model()
    given = noisy(clip, 2, torch.Generator().manual_seed(0))
    before = float(made.loss(given).detach())
    train_flow(made, lambda _: given, 20, 1e-2)
    assert float(made.loss(given).detach()) < 0.8 * before


def test_the_recipe_leaves_a_model_that_animates(clip, tmp_path):
    more = ["--dim", "12", "--layers", "1", "--batch", "2", "--frames", "2", "--strategy", SPEC, "--without", "pose"]
    assert recipe.main(["--out", str(tmp_path), "--smoke", *more]) == 0
    about = json.loads((tmp_path / "results.json").read_text())
    assert about["steps"] == 3 and set(about["judged"]) >= {"hand_keypoints", "mask_iou"}
    made = AvatarModel.load(tmp_path)
    assert made.config.pose is False
    signal = torch.rand(6, 3, 2, generator=torch.Generator().manual_seed(1))
    video = made.animate(clip, signal, steps=2, seed=3)
    assert video.shape == (6, 3, 3, 16, 16) and torch.equal(video, made.animate(clip, signal, steps=2, seed=3))
    assert not torch.equal(video, made.animate(clip, 1 - signal, steps=2, seed=3))
    for wrong, said in ((signal[:2], "of as many clips"), (signal[..., :1], "a signal is")):
        with pytest.raises(UserError, match=said):
            made.animate(clip, wrong)
    with pytest.raises(UserError, match="16 pixels a side"):
        made.animate(draw(6, 2, 32, torch.Generator()), signal)
    with pytest.raises(UserError, match="has no avatars: train one"):
        AvatarModel.load(tmp_path / "none")
    with pytest.raises(SystemExit):
        recipe.main(["--out", str(tmp_path), "--without", "audio"])
