# SPDX-License-Identifier: Apache-2.0
"""Decoders of transformers whose tokens several processes share (``parallelism.ContextParallelism``).

Every process calls the model with the same whole batch. Before the model runs, each takes its rows of tokens, positions
and labels; the model computes with those alone, and attention at each site is answered by the strategy's
:class:`manyheads.parallelism.SharedAttention`. Masks are those that transformers would make: causal, a layer's window,
padding (``attention_mask [B, S]``), texts in a row (``position_ids`` that begin anew, without a cache).

    loss        of all tokens, in every process; backward gives a process the gradient *through its own tokens*: those
                of all processes are to be added, by :func:`manyheads.parallel.sum_gradients`. What averages instead
                (DDP; FSDP2 without ``set_gradient_divide_factor(1)``) gives it divided by the number of processes
    logits      of this process's tokens, ``out.shared.rows``; ``out.shared.unshard(out.logits, 1)`` are all of them.
                ``logits_to_keep=n`` gives the last n of the sequence, in every process
    cache       each process holds the keys of its tokens, and decoding is exact (``shared_decoding``)

The plan of a forward travels as an attribute of the mask that layers are given, so that gradient checkpointing finds
it again.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..call import AttentionCall, Site
from ..errors import UserError
from ..parallel._context import World
from ..parallelism import ContextParallelism, FrontedAttention, SharedAttention, SharedStates, StateParallelism
from ..strategy import AttentionCompute, LinearCompute, Strategy
from .cache import find_cache
from .hook_chain import BoundStrategy
from .shared_decoding import Decoded, SharedCache
from .shared_plan import Front, Plan, last_logits, marked, plan_of, real_runs, texts
from .shared_states import pass_on
from .sites import SiteState

if TYPE_CHECKING:
    from ..parallel._layouts import Layout
    from ..parallel._masks import AttnMask

__all__ = ["SharedTokens", "among", "share_tokens"]

_IGNORED = -100  # the label of a token that is not predicted, as transformers has it
_BY_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "labels", "shift_labels")  # [B, S, ...]
_KEPT = 16  # masks whose exchange is remembered
_Shared = SharedAttention | FrontedAttention


def among(strategies: Sequence[Strategy], mesh: Any) -> tuple[Strategy, ...]:
    """The same strategies, of which those that share tokens do so among the processes of ``mesh``.

    Args:
        strategies: of one port.
        mesh: a :class:`~manyheads.parallel.World`, a device mesh of one dimension or its process group; None for all
            processes.

    Raises:
        UserError: no strategy shares tokens, there are no processes, or the mesh has several dimensions.
    """
    if not any(isinstance(one, ContextParallelism) for one in strategies):
        raise UserError(
            "mesh= names processes that share tokens, and no strategy does: add one, see `manyheads list --category "
            "parallel`"
        )
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise UserError(f"tokens are shared along one dimension of a mesh: give one, as mesh[{_names(mesh)[-1]!r}]")
        mesh = mesh.get_group()
    world = mesh if isinstance(mesh, World) else World(group=mesh)
    return tuple(SharedTokens(given=one, world=world) if isinstance(one, ContextParallelism) else one
                 for one in strategies)  # fmt: skip


def _names(mesh: DeviceMesh) -> tuple[str, ...]:
    return mesh.mesh_dim_names or ("name",)


@dataclass(frozen=True, kw_only=True)
class SharedTokens(AttentionCompute):
    """Answers attention by a strategy that shares tokens among processes.

    Attributes:
        given: the strategy.
        world: the processes.
    """

    given: ContextParallelism
    world: World
    _states: list[SharedStates] = field(default_factory=list, compare=False, repr=False)
    _made: "dict[tuple[AttnMask, int], tuple[_Shared, Any]]" = field(default_factory=dict, compare=False, repr=False)

    @property
    def spec(self) -> str:
        return self.given.spec

    def selects(self, site: Site) -> bool:
        linear = site.kind == "linear" and isinstance(self.given, StateParallelism)
        return linear or super().selects(site)

    @property
    def states(self) -> SharedStates:
        """What the strategy makes of layers that pass on a state, once."""
        assert isinstance(self.given, StateParallelism)
        if not self._states:
            self._states.append(self.given.share_states(self.world))
        return self._states[0]

    def share(self, mask: "AttnMask", layout: "Layout | None" = None) -> _Shared:
        """What the strategy makes of a mask, once."""
        key = mask, id(layout)
        if key not in self._made:
            if len(self._made) >= _KEPT:
                self._made.clear()
            self._made[key] = self.given.share(self.world, mask, layout), layout  # kept, so that its id is its own
        return self._made[key][0]

    def attend(self, call: AttentionCall) -> Tensor:
        plan = plan_of(call.mask)
        if plan is None:
            raise UserError(
                f"{self.spec}: {call.site.name} was called with another mask than the model was given: call the model "
                "itself, with nothing that edits masks"
            )
        if call.recurrence is not None and not isinstance(plan, Front):
            return pass_on(call, call.recurrence, plan, self.states)
        cannot = {
            "a bias": call.bias is not None, "softcap": call.softcap is not None, "dropout": call.dropout > 0,
            "keys of no token": call.prepended > 0,
        }  # fmt: skip
        if found := [name for name, there in cannot.items() if there]:
            raise UserError(f"{self.spec} computes no attention with {found[0]}, which {call.site.name} has")
        if isinstance(plan, Front):
            return plan.attend(call)
        if isinstance(plan, Plan) and isinstance(plan.main, FrontedAttention):
            return plan.main.attend_call(call, plan.front.get(call.site.name))
        out, lse = plan.attend(call)
        if call.sinks is not None:  # a logit more in the softmax, with the value 0
            out = out * (lse - call.sinks[:, None]).sigmoid().to(out.dtype)[..., None]
        return out.transpose(1, 2)


def share_tokens(model: nn.Module, entries: Sequence[tuple[Site, nn.Module, BoundStrategy]]) -> Callable[[], None]:
    """Have calls of ``model`` share their tokens where a strategy of ``entries`` says so.

    Returns:
        A function that takes the hooks off again.

    Raises:
        UserError: another strategy at the same sites, or a model that is no decoder whose tokens can be shared.
    """
    for site, module, _ in entries:
        claims = SiteState.claims(module, Strategy)
        sharing = next((s for s in claims if isinstance(s, SharedTokens)), None)
        for other in claims:
            if sharing is not None and other is not sharing and not isinstance(other, LinearCompute):
                raise UserError(
                    f"{sharing.spec} and {other.spec} cannot hold together: each process sees only its tokens at "
                    f"{site.name}; use one after the other"
                )
    mine = next((entry.strategy for _, _, entry in entries if isinstance(entry.strategy, SharedTokens)), None)
    if mine is None:
        return lambda: None
    target = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    sites = [site for site, _, entry in entries if entry.strategy is mine]
    if target is None or (reason := _unfit(target, sites, mine)) is not None:
        raise UserError(f"{mine.spec} cannot share the tokens of {type(model).__name__}: "
                        f"{'it holds no model of transformers' if target is None else reason}")  # fmt: skip
    windows = [site.window for site in sites if site.kind != "linear"] or [None]
    before = None if None in windows else max(w for w in windows if w is not None) - 1

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        return (), _taken(mine, target, _named(target, args, kwargs), before)

    handles = [
        target.register_forward_pre_hook(enter, with_kwargs=True),
        target.register_forward_hook(_leave, with_kwargs=True),
    ]

    def restore() -> None:
        for handle in handles:
            handle.remove()

    return restore


def _unfit(model: PreTrainedModel, sites: Sequence[Site], strategy: SharedTokens) -> str | None:
    """Why the tokens of ``model`` cannot be shared; None where they can."""
    config = model.config.get_text_config()
    takes = inspect.signature(model.forward).parameters
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if strategy.given.layers is not None:
        return "all layers share them or none; leave layers away"
    linear = [site for site in sites if site.kind == "linear"]
    kinds -= {"linear_attention"} if linear else set()
    if any(not (site.causal and site.kind == "self") for site in sites if site not in linear):
        return "it has attention that is not causal; give a decoder alone"
    if len(sites) != config.num_hidden_layers or any(site.kv_sharing for site in sites) or kinds:
        return "not every layer is attention with keys of its own, causal or in a window; give a plain decoder"
    if "position_ids" not in takes or "attention_mask" not in takes:
        return "it takes no position_ids, without which a token does not know its place; give one with rotary positions"
    if getattr(config, "output_router_logits", False):
        return "its loss of balance would be each process's own; set output_router_logits=False"
    return None


def _named(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _taken(strategy: SharedTokens, model: PreTrainedModel, given: dict[str, Any], before: int | None) -> dict[str, Any]:
    """Arguments of a call with those of this process's tokens alone."""
    if isinstance(plan_of(given.get("attention_mask")), Front):
        return given
    tokens = next((x for name in _BY_TOKEN[:2] if (x := given.get(name)) is not None), None)
    if tokens is None:
        raise UserError(f"{strategy.spec} shares input_ids or inputs_embeds; the model was given neither")
    cache, told = find_cache(*given.values()), given.get("attention_mask")
    if told is not None and not (isinstance(told, Tensor) and told.ndim == 2):
        raise UserError(f"{strategy.spec} makes masks of its own: give attention_mask as [B, S], or none")
    if given.get("output_attentions"):
        raise UserError(f"{strategy.spec} has no attention weights: leave output_attentions away")
    if cache is not None and (isinstance(cache, SharedCache) or int(cache.get_seq_length()) > 0):
        if not isinstance(cache, SharedCache):
            raise UserError(
                f"{strategy.spec} did not fill this cache for decoding: read the prompt with logits_to_keep=1, as "
                "generate does, while the strategy is in use"
            )
        return given | {"attention_mask": marked(Decoded(strategy.world, cache, tokens.shape[1], told), tokens, model)}
    if strange := [name for name, x in given.items() if isinstance(x, Tensor) and name not in (
        *_BY_TOKEN, "attention_mask", "num_items_in_batch", "logits_to_keep")]:  # fmt: skip
        raise UserError(f"{strategy.spec} does not know how tokens share {strange[0]}: leave it away")
    batch, size = tokens.shape[:2]
    cached = given.get("use_cache")
    cached = cache is not None or (getattr(model.config, "use_cache", False) if cached is None else cached)
    places, kept = given.get("position_ids"), given.get("logits_to_keep", 0)
    if places is None:
        places = torch.arange(size, device=tokens.device)[None]
    if places.ndim != 2 or places.shape[1] != size:
        raise UserError(f"{strategy.spec} wants position_ids as [B, S], not {list(places.shape)}")
    apart = told is None and not cached  # when transformers itself looks for texts in a row
    runs = texts(places) if apart else real_runs(told, batch, size)
    plan = Plan(strategy, size, runs, apart, before)
    _read_first(plan, model, given)
    given = _labelled(strategy, model, given | {"position_ids": places}, plan)
    shared = {name: plan.main.shard(x, 1) for name in _BY_TOKEN if (x := given.get(name)) is not None}
    if isinstance(kept, Tensor) or (kept and plan.labelled):
        raise UserError(f"{strategy.spec} keeps the logits of so many last tokens, without a loss, or of all")
    if kept:
        plan.kept = min(int(kept), size)
        shared["logits_to_keep"] = (plan.main.rows >= size - plan.kept).nonzero()[:, 0].to(tokens.device)
    return given | shared | {"attention_mask": marked(plan, tokens, model)}


def _read_first(plan: Plan, model: PreTrainedModel, given: dict[str, Any]) -> None:
    """Have the model under its head read what the plan's attention wants in front."""
    if not isinstance(plan.main, FrontedAttention) or not len(plan.main.front):
        return
    name = next(name for name in _BY_TOKEN[:2] if given.get(name) is not None)
    first = given[name][:, plan.main.front.to(given[name].device)]
    places = torch.arange(first.shape[1], device=first.device).expand(len(first), -1)
    mask = marked(Front(plan.front), first, model)
    model.base_model(**{name: first}, position_ids=places, attention_mask=mask, use_cache=False)


def _labelled(
    strategy: SharedTokens, model: PreTrainedModel, given: dict[str, Any], plan: Plan
) -> dict[str, Any]:  # fmt: skip
    """Labels of the next tokens, made before they are shared, and how many there are in all."""
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if labels is None:
        return given
    if "shift_labels" not in inspect.signature(model.loss_function).parameters:
        raise UserError(f"{strategy.spec}: the loss of {type(model).__name__} takes no shift_labels: leave labels away "
                        "and compute it from the logits")  # fmt: skip
    if shifted is None:
        shifted = torch.nn.functional.pad(labels, (0, 1), value=_IGNORED)[:, 1:]
    plan.labelled = True
    count = given.get("num_items_in_batch")
    count = (shifted != _IGNORED).sum() if count is None else count
    return given | {"shift_labels": shifted, "num_items_in_batch": count}


def _leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    """Give the loss of all tokens, logits that were asked for by place, and how tokens were shared."""
    plan = plan_of(kwargs.get("attention_mask"))
    if not isinstance(plan, Plan):
        return out
    if not isinstance(out, dict):
        raise UserError(f"{plan.strategy.spec} adds to what a model returns by name: leave return_dict=False away")
    made: Any = out
    made.shared = plan.main
    if plan.labelled:
        total = made["loss"].detach().clone()
        dist.all_reduce(total, group=plan.strategy.world.group)
        made["loss"] = made["loss"] + (total - made["loss"].detach())
    if plan.kept:
        made["logits"] = last_logits(plan, made["logits"])
        cache = find_cache(*kwargs.values(), *made.values())
        if isinstance(cache, Cache):
            SharedCache.of(cache, plan.main.rows, plan.size)
    return made
