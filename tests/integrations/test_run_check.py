# SPDX-License-Identifier: Apache-2.0
"""A strategy that did not act in one of several runs raises when the port closes, not only one that never acted."""

import pytest

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0  # noqa: E402

import manyheads  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.strategy import AttentionWatch, DenoiserPrediction  # noqa: E402
from oracles.pipelines import run_sd, run_wan, sd, wan  # noqa: E402


class Watch(AttentionWatch):
    def watch(self, call, out):
        pass


class Guide(Watch, DenoiserPrediction):
    def denoise(self, call):
        return call.predict()


@pytest.mark.parametrize("unseen", [(1,), (0,), (0, 1, 2), ()])
def test_attention_that_is_not_seen_in_a_picture(unseen):
    """By a processor without SDPA, in some pictures of three."""
    pipe, made = sd(), []

    def three():
        for picture in range(3):
            pipe.unet.set_attn_processor(AttnProcessor() if picture in unseen else AttnProcessor2_0())
            made.append(run_sd(pipe))

    if not unseen:
        with manyheads.use(pipe, Watch()):
            three()
        return
    told = "never seen" if len(unseen) == 3 else f"in run {unseen[0] + 1} of the denoiser and did not act there at down"
    with pytest.raises(UserError, match=told), manyheads.use(pipe, Watch()):
        three()
    assert len(made) == 3


def test_predictions_that_are_not_made_in_a_picture(monkeypatch):
    """The attention is seen, and the predictions of the second picture have names that mean another's guidance."""
    pipe = wan()
    with manyheads.use(pipe, Guide()):
        run_wan(pipe)
        run_wan(pipe)
    with pytest.raises(UserError, match="in run 2 of the denoiser and did not act"), manyheads.use(pipe, Guide()):
        run_wan(pipe)
        context = pipe.transformer.cache_context
        monkeypatch.setattr(pipe.transformer, "cache_context", lambda name, **kwargs: context(f"{name}_skip", **kwargs))
        run_wan(pipe)
        monkeypatch.undo()
    with manyheads.use(pipe, Watch()):  # which makes no predictions
        run_wan(pipe)


def test_a_picture_that_an_error_ended_is_not_looked_at():
    pipe = sd()

    def stop(pipe, step, timestep, kept):
        raise KeyboardInterrupt

    def denoise(break_off):
        pipe.unet.set_attn_processor(AttnProcessor() if break_off else AttnProcessor2_0())
        if not break_off:
            run_sd(pipe)
            return
        with pytest.raises(KeyboardInterrupt):
            run_sd(pipe, callback_on_step_end=stop)

    with manyheads.use(pipe, Watch()):
        denoise(False)
        denoise(True)
        denoise(False)


def test_two_ports_count_for_themselves():
    pipe = sd()
    with pytest.raises(UserError, match="in run 3 of the denoiser"), manyheads.use(pipe, Watch(layers=(0,))):
        run_sd(pipe)
        with manyheads.use(pipe, Guide()):
            run_sd(pipe)
        pipe.unet.set_attn_processor(AttnProcessor())
        run_sd(pipe)
