# SPDX-License-Identifier: Apache-2.0
"""A video's frames on several processes: the same output as on one, and no exchange where attention is used again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from safetensors.torch import load_file

import manyheads
from manyheads.errors import UserError
from manyheads.integrations.frames import split_frames
from manyheads.parallel import FrameParallel
from oracles import diffusion as tiny
from oracles import pipelines
from parallel import frames_worker as worker
from tolerance import assert_close, error

EXACT = 1e-12  # float64, the same numbers; only the sizes of matrix products differ
TESTS = Path(__file__).parents[1]
BRANCH = "uncond+cond"


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What the processes left: for each scenario tensors and facts, by rank."""
    folder = tmp_path_factory.mktemp("processes")
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    done = subprocess.run(
        [sys.executable, worker.__file__, str(folder)], env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    names = {"shared3": 3, "shared2": 2, "pipelines": 2, "failing": 2}
    files = {name: [folder / f"{name}-{rank}" for rank in range(ranks)] for name, ranks in names.items()}
    return {
        name: [(load_file(f"{file}.safetensors"), json.loads(Path(f"{file}.json").read_text())) for file in of]
        for name, of in files.items()
    }


@pytest.fixture(params=[2, 3])
def shared(request, left):
    return request.param, left[f"shared{request.param}"]


@pytest.fixture
def piped(left):
    return left["pipelines"]


@pytest.fixture(scope="module")
def alone():
    """The same runs on one process: plain and with PAB, in both dtypes."""
    made = {}
    for name, dtype in (("64", torch.float64), ("32", torch.float32)):
        made[f"plain{name}"] = worker.used(worker.pipeline(dtype))
        made[f"pab{name}"] = worker.used(worker.pipeline(dtype), worker.PAB)
    return made


def test_one_call_is_the_same_on_several_processes(shared):
    ranks, processes = shared
    for made, facts in processes:
        for name, (frames, height, width) in worker.SHAPES.items():
            if frames % ranks:
                continue
            want = worker.forward(worker.build(frames), name)
            assert_close(made[name], want, EXACT)
            assert torch.equal(made[f"{name}_after"], want) and torch.equal(made[name], processes[0][0][name])
            traffic, places = facts[name], height * width // 4
            assert (traffic["exchanges"], traffic["skipped"]) == (4, 0)  # two blocks, before and after
            assert traffic["gather"] == 2 * 4 * frames // ranks * height * width * 8 * (ranks - 1)
            assert traffic["check"] == 24 * (ranks - 1)
            if places % ranks == 0:  # all but its own share of [2 * places, frames / ranks, 16]
                assert traffic["all_to_all"] == 4 * 2 * places * frames // ranks * 16 * 8 * (ranks - 1) // ranks
        assert_close(made["mask"], worker.forward(worker.build(), mask=True), EXACT)
        alone = worker.forward(worker.build(), enable_temporal_attentions=False)
        assert_close(made["frames_alone"], alone, EXACT)
        assert error(alone, made["even"]) > 1e-3 < error(made["mask"], made["even"])
        assert made["half"].dtype == torch.bfloat16 and error(made["half"], made["even"]) < 0.05
    for name, (frames, height, width) in worker.SHAPES.items():  # what is sent in all, however places are shared
        if frames % ranks == 0:
            tokens = 2 * frames * height * width // 4
            sent = sum(facts[name]["all_to_all"] for _, facts in processes)
            assert sent == 4 * tokens * 16 * 8 * (ranks - 1) // ranks


def test_mistakes_would_show(shared):
    """No exchange, the first frames' positions everywhere, parts gathered in another order: none passes for right."""
    for made, _ in shared[1]:
        for mistake in ("without_exchange", "wrong_positions", "wrong_order"):
            assert error(made[mistake], made["even"]) > 1e-3


@pytest.mark.parametrize("kind", ["plain", "pab"])
def test_a_run_is_the_same_on_two_processes(piped, alone, kind):
    for made, facts in piped:
        assert_close(made[f"{kind}64"], alone[f"{kind}64"][0], EXACT)
        assert_close(made[f"{kind}32"], alone[f"{kind}32"][0])
        assert all(facts[f"there{name}"] and facts[f"removed{name}"] for name in ("64", "32"))
    assert torch.equal(piped[0][0][f"{kind}32"], piped[1][0][f"{kind}32"])
    assert error(alone["pab64"][0], alone["plain64"][0]) > 1e-6  # there is something that PAB changes


def test_no_guidance_is_the_same_too(piped):
    want, told = worker.used(worker.pipeline(), worker.PAB, guidance=1.0)
    for made, facts in piped:
        assert_close(made["unguided"], want, EXACT)
        assert facts["unguided"]["pab"].keys() == told["pab"].keys() and want.shape[0] == 1
        assert all(list(kept) == ["all"] for kept in facts["unguided"]["pab"].values())


def test_exchanges_are_those_of_the_computed_attentions_over_time(piped, alone):
    pipe = worker.pipeline()
    pipe.scheduler.set_timesteps(worker.STEPS)
    timesteps = pipe.scheduler.timesteps.tolist()
    inside = [150 < timestep < 930 for timestep in timesteps]
    computed = [
        step for step in range(worker.STEPS) if not (inside[step] and step % 4 and step and inside[step - 1])
    ]  # the rule of PAB, for attention over time
    assert 0 < len(computed) < worker.STEPS
    blocks = len(pipe.transformer.temporal_transformer_blocks)
    for _, facts in piped:
        plain, pab = facts["plain64"], facts["pab64"]
        counts = {site: kept[BRANCH] for site, kept in pab["pab"].items()}
        want = alone["pab64"][1]["pab"]
        for site, count in counts.items():
            assert (count["computed"], count["reused"]) == tuple(
                want[site][BRANCH][what] for what in ("computed", "reused")
            )
        over_time = [count for site, count in counts.items() if site.startswith("temporal")]
        assert len(over_time) == blocks and {count["computed"] for count in over_time} == {len(computed)}
        assert plain["exchanges"] == 2 * blocks * worker.STEPS and plain["skipped"] == 0
        assert pab["exchanges"] == 2 * sum(count["computed"] for count in over_time)
        assert pab["skipped"] == 2 * sum(count["reused"] for count in over_time) > 0
        assert pab["all_to_all"] * worker.STEPS == plain["all_to_all"] * len(computed)
        assert plain["all_to_all"] == plain["exchanges"] * (2 * 16 * 3 * 16 * 8) // 2  # half of [2 * 16, 3, 16] each
        assert pab["gather"] == plain["gather"] == worker.STEPS * 2 * 8 * 3 * 8 * 8 * 8
        assert facts["plain32"]["all_to_all"] * 2 == plain["all_to_all"]


def test_strategies_are_told_what_part_they_see(piped, alone):
    """Kind and axis are those of one process; layout and shapes those of the part."""
    whole = alone["pab64"][1]["note"]
    for _, facts in piped:
        told = facts["pab64"]["note"]
        assert told.keys() == whole.keys() and len(told) == 6
        for site, kept in told.items():
            for part, (kind, axis, *_) in zip(kept[BRANCH], whole[site][BRANCH], strict=True):
                assert part[:2] == [kind, axis]
                rows, _, length = part[5:8]
                if site.startswith("temporal"):
                    assert axis == "time" and part[2:5] == [6, 1, 8] and (rows, length) == (2 * 8, 6)
                else:
                    assert axis == ("all" if kind == "cross" else "space")
                    assert part[2:5] == [3, 4, 4] and (rows, length) == (2 * 3, 16)


def test_the_axis_is_told_where_sizes_could_be_taken_for_another(shared):
    """On two processes a part has as many places as frames: attention over time looks like that within a frame."""
    want = {"transformer_blocks": "space", "temporal_transformer_blocks": "time"}
    for _, facts in shared[1]:
        for site, axis in facts["axes"].items():
            assert axis == ("all" if site.endswith("attn2") else want[site.split(".")[0]])


def test_one_process_changes_no_bit(piped):
    for made, facts in piped:
        assert torch.equal(made["alone"], made["single"]) and torch.equal(made["after"], made["single"])
        sent = facts["alone"]
        assert sent["all_to_all"] == sent["gather"] == sent["check"] == 0 < sent["exchanges"]


def test_what_is_refused_is_refused_on_every_process(piped):
    for _, facts in piped:
        for name, line in {
            "other_noise": "different hidden_states", "inside": "open split_frames first", "twice": "open on this",
            "odd": "3 frames cannot be shared evenly by 2", "long": "positions in time for 8 frames, not 6",
            "small": "1 tokens cannot be shared by 2", "gradients": "torch.no_grad", "elsewhere": "not in the group",
        }.items():  # fmt: skip
            assert line in facts["refused"][name] and "\n" not in facts["refused"][name]


def test_a_process_that_fails_keeps_none_waiting(left):
    (_, first), (_, last) = left["failing"]
    assert last["error"] == "out of order"
    assert first["error"] and first["error"] != last["error"]
    assert worker.PATIENCE * 0.9 < first["seconds"] < 60  # the patience of all other groups is 180


def test_without_processes_and_on_other_denoisers():
    with pytest.raises(UserError, match="init_process_group first"):
        FrameParallel()
    for target in (tiny.build("wan"), pipelines.dit(), torch.nn.Linear(2, 2), "latte"):
        with pytest.raises(UserError, match="a LattePipeline or a LatteTransformer3DModel"), split_frames(target, None):
            pass


def test_pab_on_latte_counts_by_kind(alone):
    """What the processes are compared with does what PAB says: attention over time less often than within a frame."""
    counts = {site: kept[BRANCH]["computed"] for site, kept in alone["pab64"][1]["pab"].items()}
    over_time = {count for site, count in counts.items() if site.startswith("temporal")}
    within = {count for site, count in counts.items() if site.startswith("transformer") and site.endswith("attn1")}
    assert max(over_time) < min(within) < worker.STEPS
    assert manyheads.parse(worker.PAB).temporal == 4
