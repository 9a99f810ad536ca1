# SPDX-License-Identifier: Apache-2.0
"""Selection of attention heads of a denoiser for anything that images can be scored by.

HeadHunter (arXiv 2506.10978): heads are added to the perturbed ones in rounds, each time those under which the same
prompts and noise score best. Two selections are composed by joining their heads, or by starting the search for one
objective from the heads that were found for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .call import AttentionCall
from .errors import UserError
from .heads import HeadTable
from .integrations import use
from .spec import parse
from .strategy import AttentionWatch, Strategy

__all__ = ["HeadSelection", "Objective", "named_objective", "select_heads"]

Objective = Callable[[Tensor, Sequence[str]], Any]


@dataclass(frozen=True)
class HeadSelection:
    """Heads that were found.

    Attributes:
        strategy: with the heads found; open the pipeline with it.
        table: scores of single heads beside those that the search started from, an entry for each image.
        rounds: mean scores of the heads in each round, by ``layer.head``.
        plain: mean score without guidance.
        found: mean score with the heads found, on the images that they were chosen by: a little too good.
    """

    strategy: Any
    table: HeadTable
    rounds: list[dict[str, float]]
    plain: float
    found: float


@dataclass(frozen=True, kw_only=True)
class _Watch(AttentionWatch):
    """Takes down how many heads each layer has."""

    seen: dict[int, int] = field(default_factory=dict, hash=False, compare=False)

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        if call.site.kind in ("self", "joint"):
            layer = call.site.index if call.site.layer is None else call.site.layer
            self.seen[layer] = min(out.shape[2], self.seen.get(layer, out.shape[2]))


def named_objective(name: str, pipe: Any) -> Objective:
    """What images are scored by, under a name.

    - a measure of images: ``brightness``, ``contrast``, ``saturation``, ``warmth``, ``edges``; ``-warmth``: the less;
    - of the pipelines that ship: ``likelihood``, how likely the judge holds what the prompt says, in nats a word; or a
      word that they know (``frog``), how likely the judge sees that;
    - ``module:function``, any function ``(images, prompts) -> N values`` that can be imported.

    Raises:
        UserError: there is none of that name.
    """
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            found: Objective = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{name} cannot be imported: {error}") from error
        return found
    from .models.scenes import ScenePipeline

    words = {word for kind in pipe.vocabulary.values() for word in kind} if isinstance(pipe, ScenePipeline) else set()
    if name in words or (words and name == "likelihood"):
        return _judged(pipe, "" if name == "likelihood" else name)
    from .diffusion._styles import STYLES, style

    if name.removeprefix("-") not in STYLES and words:
        raise UserError(
            f"no objective is called {name!r}; there are {', '.join(STYLES)} (each also with a -), likelihood, a word "
            f"of {', '.join(sorted(words))}, and module:function"
        )
    measure = style(name)
    return lambda images, prompts: measure(images)


def _judged(pipe: Any, word: str) -> Objective:
    """The judge's mean log-probability of the words of the prompt, or of one word whatever the prompt says."""
    from .models.judge import load_judge

    judge = load_judge(pipe.config.kind, str(pipe.device))[0]
    vocabulary = list(pipe.vocabulary.values())

    def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
        chances = [each.cpu().clamp(min=1e-6).log() for each in judge.see(images).chances.values()]
        asked = [[word] if word else [w for w in pipe.words(prompt) if w] for prompt in prompts]
        return torch.tensor([
            sum(float(chances[k][n][known.index(w)]) for w in said for k, known in enumerate(vocabulary) if w in known)
            / max(len(said), 1)
            for n, said in enumerate(asked)
        ])  # fmt: skip

    return score


def select_heads(
    pipe: Any, objective: str | Objective, *, prompts: Sequence[str] = (), images: int = 5, rounds: int = 5,
    top: int = 3, strategy: str | Strategy = "headhunter:scale=3,strength=1", candidates: Sequence[str] = (),
    seed: int = 0, steps: int | None = None, guidance: float | None = 1.0, batch: int = 16,
    progress: Callable[[int, int], None] | None = None, state: dict[str, Any] | None = None,
) -> HeadSelection:  # fmt: skip
    """Select heads whose perturbation brings images nearer to an objective.

        found = manyheads.select_heads(pipe, "warmth", prompts=["an old harbour", "a cat asleep"])
        with manyheads.use(pipe, found.strategy): ...

    The defaults are the paper's for a style; for general quality it has ``rounds=1, top=24, images=20`` and
    ``strength=0.25``.

    Args:
        pipe: a pipeline of diffusers.
        objective: a name (see :func:`named_objective`), or a function of images float32 ``[N, 3, H, W]`` in 0..1 on the
            CPU (videos ``[N, 3, F, H, W]``) and their N prompts, that gives N values, greater is better.
        prompts: taken in turn; captions of a shipped pipeline's own words when none are given.
        images: M, made for every head, always from the same noise.
        rounds, top: R and k.
        strategy: scale, strength and perturbation; its heads are the start.
        candidates: ``layer.head`` names to try; all heads of self- and joint attention when none are given.
        seed: of the noise, one more for each image.
        steps: of denoising; the pipeline's own when None.
        guidance: of classifier-free guidance; 1, none, as in the paper. None for the pipeline's own.
        batch: images at once.
        progress: receives how many of how many heads are done.
        state: filled as the search goes and continued from, a plain dict of JSON types.

    Raises:
        UserError: nothing to choose from, an objective that does not give N finite values, or a state of other
            settings.
    """
    base: Any = parse(strategy)
    if base.slug != "headhunter":
        raise UserError(f"heads are selected for headhunter, not for {base.slug}")
    hunt = import_module("manyheads.diffusion.headhunter").hunt
    ranking = import_module("manyheads.diffusion.headhunter").ranking
    if images < 1 or rounds < 1 or top < 1:
        raise UserError("images, rounds and top are at least 1")
    asked = _prompts(pipe, prompts, images, seed)
    judge = named_objective(objective, pipe) if isinstance(objective, str) else objective
    about = {
        "objective": objective if isinstance(objective, str) else getattr(objective, "__qualname__", "function"),
        "prompts": asked, "strategy": base.spec, "seed": seed, "steps": steps, "guidance": guidance,
    }  # fmt: skip
    state = {} if state is None else state
    if state.setdefault("about", about) != about:
        raise UserError("the state is of a search with other settings; start a new one")
    values: dict[str, list[float]] = state.setdefault("values", {})

    def scored(*acting: Any) -> list[float]:
        with torch.no_grad(), use(pipe, *acting) if acting else nullcontext():
            parts = [range(at, min(at + batch, images)) for at in range(0, images, batch)]
            made = torch.cat([_made(pipe, asked, part, seed, steps, guidance) for part in parts])
        found = [float(x) for x in judge(made, asked)]
        if len(found) != images or not all(map(math.isfinite, found)):
            raise UserError(f"the objective gave {len(found)} values for {images} images, or one that is not finite")
        return found

    watch = _Watch()
    plain = _mean(scored(watch))
    every = [f"{layer}.{head}" for layer, count in sorted(watch.seen.items()) for head in range(count)]
    tried = list(candidates) or every
    if not tried or not set(tried) <= set(every):
        raise UserError(f"no head {', '.join(sorted(set(tried) - set(every))) or 'at all'}; there are {len(every)}")

    def score(each: Any) -> float:
        found = scored(each)
        if len(each.heads) == len(base.heads) + 1:
            values[each.heads[-1]] = found
        return _mean(found)

    chosen, scores = hunt(base, tried, score, rounds=rounds, top=top, progress=progress, state=state)
    each = [{head: found[n] for head, found in values.items()} for n in range(images)]
    name = f"{about['objective']} under guidance"
    table = ranking(each, sorted(watch.seen), max(watch.seen.values()), name=name, about=about)
    return HeadSelection(chosen, table, scores, plain, _mean(scored(chosen)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _prompts(pipe: Any, given: Sequence[str], count: int, seed: int) -> list[str]:
    """A prompt for each image."""
    from .models.pipeline import parameters
    from .models.scenes import ScenePipeline

    if given and "prompt" not in parameters(pipe):
        raise UserError(f"{type(pipe).__name__} takes no prompts")
    if not given and isinstance(pipe, ScenePipeline):
        generator = torch.Generator().manual_seed(seed)
        kinds = list(pipe.vocabulary.values())
        return [
            " ".join(words[int(torch.randint(len(words), (), generator=generator))] for words in kinds)
            for _ in range(count)
        ]
    if not given and "prompt" in parameters(pipe):
        raise UserError("give prompts, the kind of text that the heads are to be used with")
    return [given[i % len(given)] for i in range(count)] if given else [""] * count


def _made(
    pipe: Any, prompts: Sequence[str], part: range, seed: int, steps: int | None, guidance: float | None
) -> Tensor:  # fmt: skip
    """The images numbered ``part``, each by its prompt and from noise of its own, ``[N, 3, (F,) H, W]``."""
    from .models.pipeline import parameters
    from .models.scenes import ScenePipeline

    takes, ours = parameters(pipe), isinstance(pipe, ScenePipeline)
    generators = [torch.Generator().manual_seed(seed + i) for i in part]
    given: Mapping[str, Any] = {
        "prompt": [prompts[i] for i in part], "num_inference_steps": steps, "guidance_scale": guidance,
        "generator": None if ours else generators, "output_type": "pt",
        "latents": torch.cat([pipe.noise(1, each) for each in generators]) if ours else None,
        "class_labels": [i % 1000 for i in part],
    }  # fmt: skip
    made = pipe(**{name: value for name, value in given.items() if name in takes and value is not None})
    frames = getattr(made, "frames", None)
    found = torch.as_tensor(made.images if frames is None else frames).float().cpu()
    return found.transpose(1, 2) if found.ndim == 5 and not ours else found
