# SPDX-License-Identifier: Apache-2.0
"""One thread, fixed seeds, no skip without a listed reason, and the proof that no test changed a shared model."""

import gc
import hashlib
import os

import pytest

from skips import checked

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is on no machine is told at once, not after a minute of tries


def pytest_configure(config):
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=slow)
    settings.register_profile("fuzz", deadline=None, max_examples=1000, suppress_health_check=slow)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file is one worker's, so that what its tests share is made once; so are those that share processes.

    The latter, which take longest, come first with the kernels: files are given out by how many tests they have.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            return "processes" if path.startswith(("tests/parallel/", "tests/kernels/")) else path

    return ByFile(config, log)


def pytest_collection_finish():
    """What imports made stays: collections that tests ask for do not look through it. Nothing is dead any sooner."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return checked((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return checked((yield))


@pytest.fixture(autouse=True)
def _quiet(request):
    """Fixed seeds and one thread for tests that use torch, at no cost for those that do not."""
    import sys

    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.manual_seed(0)
        if request.node.get_closest_marker("gpu"):
            # What earlier tests compiled counts towards the limit of recompilations, beyond which fullgraph raises.
            torch._dynamo.reset()
    return


@pytest.fixture(scope="session", autouse=True)
def _shared_models_unchanged():
    yield
    import sys

    if "oracles.models" not in sys.modules:
        return
    from oracles.models import build, built

    def digest(model):
        parts = (t.detach().contiguous().numpy().tobytes() for t in model.state_dict().values())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    for (name, dtype), model in built().items():
        assert digest(model) == digest(build(name, dtype=dtype)), f"a test changed the shared {name}"
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), f"hooks left on {name}"
