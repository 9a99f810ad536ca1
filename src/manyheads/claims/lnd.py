# SPDX-License-Identifier: Apache-2.0
"""Does normalising over whole texts give likelier text at equal entropy, and is that why top-k is worse than nucleus?

Every sampler is a curve of loss against entropy over its parameter, and curves are read at one entropy, a share of that
of pure sampling. On chains of letters counted in prose all figures are exact. On SmolLM2 texts are drawn after prose,
those of whole texts by particles, and MAUVE beside what people wrote is read at equal entropy too. Temperature, with
which every cut has to be compared, and min-p stand beside; a second draw of the same sampler says what chance does.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, higher, lower, no_worse
from ..tasks.text.chain_frontier import ChainFrontier
from ..tasks.text.sampling_frontier import SamplingFrontier

NUCLEUS = Arm("nucleus, local", "sampling:top_p=0.9")
ARMS = (
    Arm("nucleus, global", "lnd:top_p=0.9"),
    Arm("top-k, local", "sampling:top_k=40"),
    Arm("top-k, global", "lnd:top_k=40"),
    Arm("temperature, local", "sampling:temperature=0.9"),
    Arm("temperature, global", "lnd:temperature=0.9"),
    Arm("min-p, local", "sampling:min_p=0.1"),
    Arm("top-k, local again", "sampling:top_k=40"),
)
TASKS = ("chain_frontier", "sampling_frontier")
AT, KEPT = {"entropy": 0.6}, {"mass": 0.8}
WORSE = {
    task: above(f"{task}.excess", "top-k, local", 0.0, where=AT) for task in TASKS
}  # else nothing is to be explained

claim = Claim(
    slug="lnd",
    tier="scaled",
    statement=(
        "At equal entropy top-k, nucleus and temperature give likelier text when normalised over whole texts; where "
        "they keep the same mass top-k is distorted more than nucleus; and more than half of what top-k loses to "
        "nucleus at equal entropy is gone without that distortion."
    ),
    reported=Reported(
        value="curves of log-likelihood against entropy of global top-k, nucleus and temperature below those of local "
        "ones; distortion of top-k above that of nucleus at equal mean mass (k=5, 50, 150 against p=.65, .88, .95); "
        "local normalisation is called the major cause of the gap between top-k and nucleus",
        setting="Llama-2-7B, prompt 'The ', 15 tokens, 30 texts a setting; distortion on pairs of 100 tokens",
        where="abstract, and the figures of entropy and of distortion, read in the released code",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", arms=ARMS, baseline=NUCLEUS, equal="none", seeds=1,
        tasks=(ChainFrontier(), SamplingFrontier()),
        sizes=Sizes(
            quick={
                "subject": "default", "text": "code", "order": 1, "steps": 8, "samples": 2, "length": 32, "tokens": 6,
                "copies": 2, "particles": 4, "top_k": (2, 20), "top_p": (0.3, 0.9), "min_p": (0.3, 0.02),
                "temperature": (0.5, 0.9), "masses": (0.8,),
            },
            cpu={
                "sampling_frontier.samples": 6, "copies": 3, "tokens": 12, "particles": 8,
                "sampling_frontier.top_k": (3, 15, 100), "sampling_frontier.top_p": (0.4, 0.7, 0.9),
                "sampling_frontier.min_p": (0.3, 0.08, 0.01), "sampling_frontier.temperature": (0.5, 0.75, 0.9),
            },
            cuda={"chain_frontier.samples": 24, "sampling_frontier.samples": 64, "particles": 16},
        ),
    ),
    checks=(
        *(
            lower(f"{task}.nll_at_entropy", f"{cut}, global", than=f"{cut}, local", where=AT)
            for task in TASKS for cut in ("top-k", "nucleus", "temperature")
        ),
        *WORSE.values(),
        *(
            lower(f"{task}.excess", "top-k, global", than="top-k, local", factor=0.5, where=AT, given=WORSE[task])
            for task in TASKS
        ),
        *(higher(f"{task}.distortion_at_mass", "top-k, local", than="nucleus, local", where=KEPT) for task in TASKS),
        # The fair rival: temperature costs nothing, and particles cost as many times plain sampling.
        *(lower(f"{task}.nll_at_entropy", "nucleus, global", than="temperature, local", where=AT) for task in TASKS),
        *(
            higher("sampling_frontier.mauve_at_entropy", f"{cut}, global", than=f"{cut}, local", where=AT)
            for cut in ("top-k", "nucleus")
        ),
        no_worse(
            "sampling_frontier.nll_at_entropy", "top-k, local again", than="top-k, local", where=AT, margin=0.1,
            better="lower",
        ),
    ),
    report=(
        *(f"{task}.{name}" for task in TASKS for name in ("nll_at_entropy", "excess", "distortion_at_mass")),
        "sampling_frontier.mauve_at_entropy", "sampling_frontier.self_bleu",
    ),
    caveat=(
        "A model of 135 million parameters and texts of 12 to 24 tokens. With so few particles whole texts are "
        "approximate and lie towards plain sampling, which makes differences smaller, not larger. Half as the bound of "
        "'major' and the entropy of 60 % of pure sampling's are our choices; curves are joined by straight lines."
    ),
)  # fmt: skip
