# SPDX-License-Identifier: Apache-2.0
"""``manyheads inspect`` in Python: prompts are read, lenses look, and what they found is kept together."""

import dataclasses
import datetime
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from .. import environment
from ..catalog import nearest
from ..causal_lens import CausalLens
from ..data.texts import Text, digest, standard_library
from ..errors import UserError
from ..heads import AblationCurve, HeadTable, ablation_curve
from ..integrations import use
from ..integrations.transformers import find_sites
from ..lens import Lens, LensResult, device_of, max_positions
from ..progress import Progress
from . import Watching, watch
from .attention_breakdown import AttentionBreakdown
from .document import document_of, plain_values
from .intervening import check_intervening, intervened
from .naming import DEFAULT, Part, check_roles, parse_lenses
from .prompts import SHORTEST, Prompt, draw

__all__ = [
    "SAMPLES", "WHERE", "Inspection", "chosen_lenses", "describe", "document_of", "fitting", "inspect_model",
    "label_tables", "look", "max_context", "mean_loss", "plain_values", "read_prompts", "reading", "token_nll",
]  # fmt: skip

SAMPLES = 6
WHERE = "attention"  # the name under which our own lens is among the results
_DRAWS = 3  # of the control of an ablation
_ABLATED = 3  # prompts on which it is measured
_AnyLens = TypeVar("_AnyLens", Lens, Lens | CausalLens)


@dataclass(frozen=True)
class Inspection:
    """What was seen.

    Attributes:
        run: model, settings, texts and versions, fit for JSON.
        prompts: what was read.
        tokens: the text of every token of every prompt.
        found: results by the spec of their lens; under ``attention`` where the mass of every head goes.
        parts: names of the tables of ``attention`` that add up to the whole mass.
        curve: what ablation does to the loss, and the score by which heads were chosen.
        others: what was seen in the same forwards where the tokens are others: the encoder, the cross-attention.
    """

    run: dict[str, Any]
    prompts: list[Prompt]
    tokens: list[list[str]]
    found: dict[str, LensResult]
    parts: tuple[str, ...]
    curve: tuple[str, AblationCurve] | None = None
    losses: list[Any] = field(default_factory=list)  # nats of each token of each prompt, NaN for the first
    others: dict[str, "Inspection"] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean loss of a token, in nats."""
        return mean_loss(self.losses)

    def document(self) -> dict[str, Any]:
        """All of it, fit for JSON; NaN becomes null. Maps are left to the page."""
        curve = None
        if self.curve is not None:
            score, made = self.curve
            curve = {
                "score": score, "counts": list(made.counts), "heads": list(made.heads),
                "loss": made.ranked.tolist(), "control": made.control.tolist(),
            }  # fmt: skip
        prompts = [
            {"text": p.name, "ids": p.ids, "roles": {k: [list(s) for s in v] for k, v in p.roles.items()}}
            for p in self.prompts
        ]
        return {
            "run": self.run, "prompts": prompts, "loss": plain_values(self.loss), "losses": plain_values(self.losses),
            "findings": {spec: document_of(found) for spec, found in self.found.items()}, "ablation": curve,
            **({"tokens": self.tokens} if self.run["settings"].get("reads") else {}),
            **{n: {"tokens": one.tokens, "findings": one.document()["findings"]} for n, one in self.others.items()},
        }  # fmt: skip


def inspect_model(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text] | None = None,
    lenses: Sequence[str | Lens | CausalLens] = DEFAULT,
    *,
    prompts: Sequence[Prompt] | None = None,
    roles: dict[str, Part] | None = None,
    length: int | None = None,
    samples: int = SAMPLES,
    generate: int = 0,
    layers: Sequence[int] | None = None,
    ablate: str | None = None,
    against: tuple[nn.Module, str] | None = None,
    seed: int = 0,
    origin: str | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
) -> Inspection:
    """Let lenses look at a model while it reads.

        from manyheads.inspect.run import inspect_model
        model, tokenizer = manyheads.models.load_default()
        seen = inspect_model(model, tokenizer, lenses=["sinks", "rhythm"])
        seen.found["active_dormant"].tables

    Args:
        model: a causal language model of transformers or a text encoder, in evaluation mode, on the device to use.
        tokenizer: its tokenizer.
        texts: what to read, the standard library's source when None.
        lenses: lenses, their specs, or the short names of :mod:`manyheads.inspect.naming`; of the default ones those
            that find something in this model. Causal lenses ask prompts of their own, whatever is read.
        prompts: what to read in place of texts.
        roles: token positions by role, or text that has the role; they count from the beginning of a text.
        length: tokens of a prompt; 1,024 as far as model and text have so many when None.
        samples: prompts.
        generate: so many tokens that the model says to each prompt first; they have the role ``response``.
        layers: to look at; all when None.
        ablate: name of a score; the heads that it ranks highest are ablated, and the loss is measured.
        against: another checkpoint of the model and its name, for lenses that compare two.
        seed: of all draws.
        origin: what the model is called.
        command: what was typed.
        progress: called with how far the run is.

    Raises:
        UserError: anything that the caller can mend.
    """
    begun, say = time.perf_counter(), progress or (lambda done, total, message: None)
    chosen, more = chosen_lenses(lenses, layers)
    parts = {**(roles or {}), **more}
    _check_layers(model, layers)
    named_lenses, chosen = chosen, fitting(chosen, model, drop=tuple(lenses) == DEFAULT)
    predicts = _predicts(model)
    check_intervening(chosen, against, None if predicts else type(model).__name__)
    if not predicts and (generate or ablate is not None):
        raise UserError(f"{type(model).__name__} predicts no text and has no loss: leave generate and ablate away")
    reads = max_context(model) if predicts else min(max_context(model), tokenizer.model_max_length)
    if length is not None and length < SHORTEST:
        raise UserError(f"a prompt has at least {SHORTEST} tokens; give a longer --length")
    if prompts is None:
        read = list(standard_library() if texts is None else texts)
        prompts = draw(read, tokenizer, length, samples, seed, parts, reads - generate, closed=not predicts)
    else:
        read = [Text(p.name, " ".join(map(str, p.ids))) for p in prompts]
        for prompt in prompts:
            if len(prompt.ids) + generate > reads:
                raise UserError(
                    f"the model reads {reads} tokens, and {prompt.name} has {len(prompt.ids) + generate}; cut it"
                )
        parts |= {name: spans for prompt in prompts for name, spans in prompt.roles.items()}
    looking = [lens for lens in chosen if isinstance(lens, Lens)]
    check_roles(looking, parts)
    apart, heads = tuple(name for name in parts if name not in ("response", "bos")), _count_heads(model)
    own = AttentionBreakdown(
        size=256 if heads <= 256 else 128 if heads <= 1024 else 64, roles=apart, layers=_tuple(layers)
    )
    looks = len(prompts) * (4 if ablate else 1)
    if generate:
        prompts = [_answered(model, prompt, generate, say, i, looks) for i, prompt in enumerate(prompts)]
    found, losses = read_prompts(model, prompts, [*looking, own], lambda i, m: say(i, looks, m))
    shown = {lens.spec: one for lens, one in zip(looking, found, strict=False)}
    shown |= intervened(model, tokenizer, chosen, against)
    shown[WHERE] = found[-1]
    found[-1].notes += [f"{lens.slug} finds nothing to look at here." for lens in named_lenses if lens not in chosen]
    run = describe(model, prompts, read, origin, command)
    run["settings"] = {
        "lenses": [lens.spec for lens in chosen], "length": max(len(p.ids) for p in prompts), "samples": len(prompts),
        "generated": generate, "roles": sorted(parts), "layers": None if layers is None else list(layers),
        "seed": seed, "ablate": ablate, "against": against and against[1], "device": str(device_of(model)),
    }  # fmt: skip
    label_tables(shown, run)
    curve = None
    if ablate is not None:
        name, made = _score(shown, ablate)
        curve = (name, _curve(model, made, prompts[:_ABLATED], seed, say))
    say(1, 1, "")
    run["seconds"] = round(time.perf_counter() - begun, 2)
    words = [[tokenizer.decode([i]) for i in prompt.ids] for prompt in prompts]
    return Inspection(run, list(prompts), words, shown, own.parts, curve, losses)


def label_tables(found: dict[str, LensResult], run: dict[str, Any]) -> None:
    """Write into every table of ``found`` what it was measured on."""
    settings = run["settings"]
    about = {
        "model": run["model"]["name"], "prompts": settings["samples"], "tokens": settings["length"],
        "seed": settings["seed"],
    }  # fmt: skip
    for spec, one in found.items():
        one.tables = {
            n: dataclasses.replace(t, about={**about, "lens": spec, **t.about}) for n, t in one.tables.items()
        }


def chosen_lenses(
    lenses: Sequence[str | Lens | CausalLens], layers: Sequence[int] | None
) -> tuple[list[Lens | CausalLens], dict[str, Part]]:
    """The lenses that were named, those without layers of their own at ``layers``, and the roles named with them."""
    chosen: list[Lens | CausalLens] = []
    roles: dict[str, Part] = {}
    for given in lenses:
        if isinstance(given, Lens | CausalLens):
            chosen.append(given)
        else:
            more, named = parse_lenses([given])
            chosen += [lens for lens in more if lens not in chosen]
            roles |= named
    if layers is not None:
        chosen = [lens if lens.layers else dataclasses.replace(lens, layers=_tuple(layers)) for lens in chosen]
    for lens in chosen:
        if isinstance(lens, Lens) and lens.edits_model:
            raise UserError(f"{lens.spec} acts on the model and does not only look: open it with manyheads.use")
    return chosen, roles


def fitting(lenses: Sequence[_AnyLens], model: nn.Module, drop: bool) -> list[_AnyLens]:
    """The lenses that find something to look at in ``model``; others are refused where they may not be dropped."""
    sites = [site for site, _ in find_sites(model)]
    kept = [lens for lens in lenses if not sites or any(lens.selects(site) for site in sites)]  # else the port says why
    if len(kept) < len(lenses) and not (drop and kept):
        blind = next(lens for lens in lenses if lens not in kept)
        layers = sorted({site.index if site.layer is None else site.layer for site in sites})
        kinds = " and ".join(sorted({f"{'causal' if site.causal else 'bidirectional'} {site.kind}" for site in sites}))
        raise UserError(
            f"{blind.spec} finds no attention to look at in {type(model).__name__}, which has {kinds} attention in "
            f"layers {layers[0]} to {layers[-1]}"
        )
    return kept


def _predicts(model: nn.Module) -> bool:
    """Whether ``model`` predicts the next token: its attention is causal, and there is a head over the vocabulary."""
    head: Any = getattr(model, "get_output_embeddings", lambda: True)()
    return head is not None and any(site.causal for site, _ in find_sites(model))


def _tuple(layers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if layers is None else tuple(layers)


def _check_layers(model: nn.Module, layers: Sequence[int] | None) -> None:
    count = int(getattr(getattr(model, "config", None), "num_hidden_layers", 0) or 0)
    if layers is not None and count and (not layers or max(layers) >= count):
        raise UserError(f"the model has layers 0 to {count - 1}; --layers asks for {max(layers, default='none')}")


def _count_heads(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    return int(getattr(config, "num_hidden_layers", 1) or 1) * int(getattr(config, "num_attention_heads", 1) or 1)


def max_context(model: nn.Module) -> int:
    """Tokens that the model says it reads at most; no bound where it does not say."""
    return max_positions(getattr(model, "config", None)) or 2**40


def reading(model: nn.Module, prompt: Prompt) -> torch.Tensor:
    """The tokens of a prompt on the device of the model, ``[1, T]``."""
    return prompt.inputs(model)["input_ids"]


def token_nll(logits: torch.Tensor, ids: torch.Tensor) -> Any:
    """Negative log-likelihood of each token given those before it, nats/token: ``[T]``, NaN for the first."""
    parts = [logits.new_full((1,), math.nan, dtype=torch.float32)]
    for start in range(0, ids.shape[1] - 1, 512):  # a whole float32 copy of the logits may not fit
        piece = logits[0, start : min(start + 512, ids.shape[1] - 1)].float()
        parts.append(nn.functional.cross_entropy(piece, ids[0, start + 1 : start + 1 + len(piece)], reduction="none"))
    return torch.cat(parts).double().cpu().numpy()


def mean_loss(losses: Sequence[Any]) -> float:
    """Mean over all tokens that have a loss, in nats; NaN where none has."""
    known = np.concatenate([np.zeros(0), *(np.asarray(row, float) for row in losses)])
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else math.nan


def read_prompts(
    model: nn.Module, prompts: Iterable[Prompt], lenses: Sequence[Lens], say: Any
) -> tuple[list[LensResult], list[Any]]:
    """What each lens finds, and the losses of the tokens of every prompt, NaN where the model predicts none."""
    seen, losses = look(model, prompts, lenses, say)
    return [seen.compute(i) for i in range(len(lenses))], losses


def look(model: nn.Module, prompts: Iterable[Prompt], lenses: Sequence[Lens], say: Any) -> tuple[Watching, list[Any]]:
    """The look at a model that read all prompts, and the losses of :func:`read_prompts`."""
    losses, predicts = [], _predicts(model)
    with watch(model, *lenses) as seen, torch.inference_mode():
        for i, prompt in enumerate(prompts):
            say(i, f"reading {prompt.name}")
            seen.roles = prompt.parts
            if predicts:
                losses.append(_losses(model, prompt))
            else:
                model(**prompt.inputs(model))
                losses.append(np.full(len(prompt.ids), math.nan))
    return seen, losses


def _losses(model: nn.Module, prompt: Prompt) -> Any:
    """:func:`token_nll` of a prompt's tokens."""
    ids = torch.tensor([prompt.ids], device=device_of(model))
    return token_nll(model(**prompt.inputs(model), use_cache=False).logits, ids)


def _answered(model: Any, prompt: Prompt, count: int, say: Progress, i: int, total: int) -> Prompt:
    say(i, total, f"the model answers {prompt.name}")
    ids = reading(model, prompt)
    with torch.inference_mode():
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False,
            pad_token_id=getattr(model.generation_config, "pad_token_id", None) or 0,
        )  # fmt: skip
    answer = made[0, ids.shape[1] :].tolist()
    if not answer:
        raise UserError(f"the model says nothing to {prompt.name}; look without --generate")
    return prompt.answered(answer)


def _score(found: dict[str, LensResult], name: str) -> tuple[str, HeadTable]:
    """A table of heads by its name, ``lens/name`` where several have it."""
    known = {f"{spec.partition(':')[0]}/{n}": t for spec, one in found.items() for n, t in one.tables.items()}
    known = {key: t for key, t in known.items() if t.values.shape[2] > 1}
    fitting = [key for key in known if name in (key, key.partition("/")[2])]
    if not fitting:
        close = nearest(name, [*known, *(key.partition("/")[2] for key in known)])
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"no score of heads is named {name!r}: {hint}")
    return fitting[0], known[fitting[0]]


def _curve(model: nn.Module, made: HeadTable, prompts: Sequence[Prompt], seed: int, say: Progress) -> AblationCurve:
    """Loss without the heads that ``made`` ranks highest, and without others of the same layers."""
    known = int(np.isfinite(made.mean).sum())
    most = max(1, known // 3)
    counts = sorted({0, *(c for c in (1, 2, 4, 8, 16, 32, 64) if c < most), most})
    before: dict[tuple[str, ...], float] = {}
    steps = len(counts) * (1 + _DRAWS)

    def loss(heads: tuple[str, ...]) -> float:
        heads = tuple(sorted(heads))
        if heads not in before:
            say(len(before) + steps / 3, steps * 4 / 3, f"without {len(heads)} heads")
            spec = [f"ablate:heads={'+'.join(heads)}"] if heads else []
            with use(model, *spec), torch.inference_mode():
                before[heads] = mean_loss([_losses(model, prompt) for prompt in prompts])
        return before[heads]

    return ablation_curve(made, counts, loss, draws=_DRAWS, seed=seed)


def describe(
    model: nn.Module, prompts: Sequence[Prompt], read: Sequence[Text], origin: str | None,
    command: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """The foot of the page: what was run, on what, and when."""
    surroundings = environment.environment()
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "command": list(command),
        "model": {
            "name": origin or type(model).__name__, "class": type(model).__name__, "parameters": parameters,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
        "texts": {"files": len(read), "sha256": digest(read)},
        "sources": sorted({prompt.name for prompt in prompts}),
        "environment": surroundings,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
