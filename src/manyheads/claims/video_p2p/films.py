# SPDX-License-Identifier: Apache-2.0
"""The same of films: the shipped Latte, 8 frames of 16 x 16 with attention in space, over time and to the text.

Sources are films put together before photographs of the test split, in which the object moves; fields and arms are
those of ``video_p2p``, masactrl acts in the second half of the blocks. Here ``self_maps=temporal``, which is what the
released code does, stands beside maps of both kinds. No film was edited before the checks were written.
"""

from dataclasses import replace

from ...experiment import Arm, Claim, Experiment, Sizes, above, higher, no_worse
from ...tasks.diffusion.prompt_edit import PromptEdit
from . import BEST, FAST, FITTED, LIGHT, MASA, NO_BLEND, OURS, PLAIN
from . import claim as of_pictures

ARMS = (
    Arm(OURS, FAST), Arm(NO_BLEND, f"{FAST},blend=false"), Arm(MASA, "masactrl:start_step=1,start_layer=2"),
    Arm(LIGHT, options={"renoise": 0.5}), Arm(BEST, options={"renoise": 0.7, "draws": 7}),
)  # fmt: skip
MORE = (
    Arm(FITTED, "video_p2p"), Arm("blend alone", f"{FAST},cross_steps=0,self_steps=0"),
    Arm("temporal maps", f"{FAST},self_maps=temporal"), Arm("source itself", options={"copy": True}),
)  # fmt: skip

claim = Claim(
    slug="video_p2p.films",
    tier="proxy",
    statement=(
        "Swapping a word, Video-P2P keeps more of an inverted film outside its moving object than the new caption "
        "alone, masactrl, and renoising at as many evaluations, while the new object comes out as often as plainly."
    ),
    reported=replace(of_pictures.reported, where="table of quantitative results; it was not at hand"),
    experiment=Experiment(
        subject="moving", arms=ARMS, baseline=Arm(PLAIN), equal="steps", seeds=1, tasks=(PromptEdit(batch=8),),
        sizes=Sizes(
            quick={"samples": 2, "steps": 4, "batch": 2}, cpu={"samples": 12},
            cuda={"samples": 256, "batch": 8, "arms": (*ARMS, *MORE)},
        ),
    ),
    checks=(
        *(higher("kept", OURS, than=other) for other in (PLAIN, MASA, BEST, LIGHT, NO_BLEND)),
        higher("kept", NO_BLEND, than=PLAIN),
        no_worse("object", OURS, than=PLAIN, margin=0.1, better="higher"),
        above("source", OURS, 30.0),
    ),
    caveat="A small Latte of ours with eight objects, and a judge of ours; no image model is inflated and tuned.",
)  # fmt: skip
