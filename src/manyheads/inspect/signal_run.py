# SPDX-License-Identifier: Apache-2.0
"""``manyheads inspect --image``, ``--audio`` and ``--translate`` in Python."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from ..call import Site
from ..data.texts import Text
from ..errors import UserError
from ..integrations.site_search import find_sites
from ..lens import Lens, device_of
from ..progress import Progress
from .naming import DEFAULT, role_of
from .run import WHERE, Inspection, chosen_lenses, describe, fitting, label_tables, look
from .signal_breakdown import SignalBreakdown
from .signals import Signal

__all__ = ["inspect_signals"]


def inspect_signals(
    model: nn.Module,
    signals: Sequence[Signal],
    lenses: Sequence[str | Lens] = DEFAULT,
    *,
    layers: Sequence[int] | None = None,
    notes: Sequence[str] = (),
    origin: str | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Inspection:
    """Let lenses look at a model while it sees images, hears recordings or translates.

        from manyheads.inspect.signal_run import inspect_signals
        from manyheads.inspect.signals import read_images

        seen = inspect_signals(model, read_images(["cat.png"], model, processor), ["sinks"])
        seen.found["attention"].notes

    Args:
        model: a vision transformer, or an encoder-decoder that transcribes or translates, in evaluation mode.
        signals: of :func:`.signals.read_images`, :func:`.signals.read_audio` or
            :func:`.translations.read_translations`, all of one kind.
        lenses: as for :func:`.run.inspect_model`; those that look at parts of a text are refused.
        layers: to look at, as the tables number them; all when None.
        notes: to be shown, on how the files were read.
        origin: what the model is called.
        command: what was typed.
        progress: called with how far the run is.

    Returns:
        What was seen in the image, or in the decoder; its ``others`` are ``cross`` and ``encoder``.

    Raises:
        UserError: anything that the caller can mend.
    """
    begun, say = time.perf_counter(), progress or (lambda done, total, message: None)
    named, roles = chosen_lenses(lenses, None)
    given = [lens for lens in named if isinstance(lens, Lens)]
    if asking := [lens.spec for lens in named if lens not in given]:
        raise UserError(f"{asking[0]} asks a language model prompts of its own: leave --image and --audio away")
    reads = "image" if signals[0].grid else "sentence" if signals[0].pieces else "audio"
    for lens in given:
        if roles or role_of(lens):
            raise UserError(f"{lens.spec} looks at parts of a text, which no {reads} has; take another lens")
    chosen = fitting(given, model, drop=tuple(lenses) == DEFAULT)
    sites = [site for site, _ in find_sites(model)]
    if not sites:
        raise UserError(f"{type(model).__name__} computes attention in its own way, which cannot be looked into")
    parts = _parts(sites, layers)
    own = SignalBreakdown(size=256 if sum(site.num_heads or 1 for site in sites) <= 256 else 128)
    try:
        seen, losses = look(model, signals, [*chosen, own], lambda i, m: say(i, len(signals), m))
    except ValueError as error:
        if "image size" not in str(error):
            raise
        raise UserError(
            f"{type(model).__name__} takes no such image ({error}); check preprocessor_config.json"
        ) from None
    run = describe(model, signals, [Text(one.name, one.digest) for one in signals], origin, command)
    settings = {
        "lenses": [lens.spec for lens in chosen], "samples": len(signals), "generated": 0, "roles": [], "reads": reads,
        "layers": None if layers is None else list(layers), "seed": 0, "ablate": None, "device": str(device_of(model)),
    }  # fmt: skip
    made: dict[str, Inspection] = {}
    for part, where in parts.items():
        found = {
            lens.spec if lens is not own else WHERE: seen.compute(i, where)
            for i, lens in enumerate([*chosen, own])
            if any(lens.selects(site) and where(site) for site in sites)
        }
        prompts = [one.in_frames() if part in ("cross", "encoder") else one for one in signals]
        longest = max(len(prompt.ids) for prompt in prompts)
        mine = {**run, "settings": {**settings, "length": longest, **({"part": part} if part else {})}}
        label_tables(found, mine)
        blind = [lens for lens in given if lens.spec not in found]
        found[WHERE].notes += [f"{lens.slug} finds nothing to look at here." for lens in blind]
        found[WHERE].notes += notes
        kept = losses if part == "decoder" else []
        shares = tuple(name for name in found[WHERE].tables if name != "entropy")
        made[part] = Inspection(mine, list(prompts), [one.labels for one in prompts], found, shares, losses=kept)
    main, *others = made
    say(1, 1, "")
    for one in made.values():
        one.run["seconds"] = round(time.perf_counter() - begun, 2)
    return replace(made[main], others={part: made[part] for part in others})


def _parts(sites: Sequence[Site], layers: Sequence[int] | None) -> dict[str, Callable[[Site], bool]]:
    """Which sites are looked at together: of an encoder-decoder three kinds, for their tokens are others."""

    def of(kind: str, causal: bool) -> Callable[[Site], bool]:
        return lambda site: site.kind == kind and site.causal == causal and (layers is None or _layer(site) in layers)

    made = {"": of("self", False)}
    if any(site.kind == "cross" for site in sites):
        made = {"decoder": of("self", True), "cross": of("cross", False), "encoder": of("self", False)}
    for part, where in made.items():
        if not any(map(where, sites)):
            known = sorted({_layer(site) for site in sites})
            raise UserError(
                f"the {part or 'model'} has no attention to look at in layers {list(layers or known)}; there are "
                f"{known[0]} to {known[-1]}"
            )
    return made


def _layer(site: Site) -> int:
    return site.index if site.layer is None else site.layer
