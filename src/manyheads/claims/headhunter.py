# SPDX-License-Identifier: Apache-2.0
"""Do a few chosen heads, perturbed, guide as well as the best whole layer, and do heads chosen for a style give it?

The shipped MMDiT of scenes (6 layers of 6 heads, joint attention) without classifier-free guidance, as in the paper.
Heads are ranked by one round of the search on captions and noise of its own, each head alone. *Quality*: by how likely
the judge holds the words that were asked for (the part of PickScore here); the layer is chosen on the same images.
w = 3, u = 0.25 are the paper's; six heads, as many as a layer has, and 2 and 12 beside them. *Style*: by a measure of
how images look, warmth (red less blue) and edges (luminance between neighbours); three heads and u = 1 are the paper's,
its five rounds of 576 heads are one of 36. Heads for one style are compared with random heads, and with those for the
other style, which any effect of guidance as such would move as far; and the object still has to be there.

On a CPU one search is judged, on many images; on a GPU six, and the seeds are what counts.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, higher, no_worse
from ..tasks.diffusion.scene_quality import SceneQuality

SPEC, STRONG = "headhunter:scale=3.0,strength=0.25", "headhunter:scale=3.0,strength=1.0"
STYLES = ("warmth", "edges")
QUALITY = (
    Arm("6 heads", SPEC, options={"heads": "searched", "count": 6}),
    Arm("best layer", SPEC, options={"heads": "layer"}),
    Arm("6 random heads", SPEC, options={"heads": "random", "count": 6}),
)
STYLE = (
    *(Arm(f"3 heads for {name}", STRONG, options={"heads": "searched", "count": 3, "style": name}) for name in STYLES),
    Arm("3 random heads", STRONG, options={"heads": "random", "count": 3}),
)
MORE = (
    Arm("2 heads", SPEC, options={"heads": "searched", "count": 2}),
    Arm("12 heads", SPEC, options={"heads": "searched", "count": 12}),
    Arm("6 heads, u = 0.5", "headhunter:scale=3.0,strength=0.5", options={"heads": "searched", "count": 6}),
    Arm("6 heads, u = 1", STRONG, options={"heads": "searched", "count": 6}),
)

claim = Claim(
    slug="headhunter",
    tier="proxy",
    statement=(
        "Guidance that perturbs six heads, chosen by a search of single heads, raises the likelihood of what was asked "
        "for above no guidance and above six random heads, and matches the best whole layer; three heads chosen for a "
        "style give more of it than no guidance, random heads, or heads chosen for another style, and keep the object."
    ),
    reported=Reported(
        value="6 of a layer's 24 heads match or beat the best layer in FID; PickScore 20.70 against 19.66 unguided; "
        "55 styles, shown by images",
        setting="SD3-medium, 576 heads; 50 unseen prompts",
        where="table of general quality, rows of HeadHunter and of the best layer; section on styles",
    ),
    experiment=Experiment(
        subject="scenes", arms=(*QUALITY, *STYLE, *MORE), baseline=Arm("no guidance"), equal="steps", seeds=1,
        tasks=(SceneQuality(steps=10, guidance=1.0, batch=64, styles=STYLES),),
        sizes=Sizes(
            quick={"samples": 24, "searched": 4, "candidates": 6, "draws": 2, "steps": 5, "arms": (*QUALITY, *STYLE)},
            cpu={"samples": 96, "searched": 16, "draws": 8, "arms": (*QUALITY, *STYLE)},
            cuda={"samples": 96, "searched": 32, "draws": 8, "seeds": 6},
        ),
    ),
    checks=(
        higher("likelihood", "6 heads", than="no guidance"),
        higher("likelihood", "6 heads", than="6 random heads"),
        # Our margins for "matches": a tenth of a nat is 10 % of odds, half a unit of FD-small two thirds of its floor.
        no_worse("likelihood", "6 heads", than="best layer", margin=0.1, better="higher"),
        no_worse("fd_small", "6 heads", than="best layer", margin=0.5, better="lower"),
        *(
            higher(name, f"3 heads for {name}", than=than)
            for name, other in (STYLES, STYLES[::-1])
            for than in ("no guidance", "3 random heads", f"3 heads for {other}")
        ),
        # One object in ten may be lost.
        *(
            no_worse("object", f"3 heads for {name}", than="no guidance", margin=0.1, better="higher")
            for name in STYLES
        ),
    ),
    caveat="A small MMDiT and a judge of ours; the search has 36 heads to choose from.",
)  # fmt: skip
