# SPDX-License-Identifier: Apache-2.0
"""What does a model attend to, which heads matter, is something unusual in it: lenses on an unmodified model."""

from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import torch

    from ..call import Site
    from ..lens import Lens, LensResult, TokenSpans


__all__ = ["Watching", "watch"]


class Watching:
    """An open or closed look at a model; made by :func:`watch`, opened by ``with``. Results outlive it."""

    def __init__(self, model: "torch.nn.Module", lenses: "tuple[Lens, ...]", roles: "TokenSpans | None") -> None:
        from ..integrations import use
        from ..lens import LensGroup

        self.lenses = lenses
        self._bundle = LensGroup(lenses=lenses)
        self._port: Any = use(model, self._bundle)
        self.roles = roles

    @property
    def roles(self) -> "TokenSpans | None":
        """Which tokens play which part in the forwards to come; may be set between them."""
        roles: TokenSpans | None = self._bundle.state.get("roles")
        return roles

    @roles.setter
    def roles(self, roles: "TokenSpans | None") -> None:
        self._bundle.state["roles"] = roles

    def __enter__(self) -> Self:
        self._port.__enter__()
        sites = [site for site, _ in self._port.kept(self._bundle)]
        if blind := [lens.spec for lens in self.lenses if not any(lens.selects(site) for site in sites)]:
            from ..errors import UserError

            self._port.__exit__(UserError, None, None)
            there = sorted({site.layer for site in sites if site.layer is not None})
            raise UserError(
                f"{blind[0]} finds no attention to look at: the other lenses look at layers {there}; change its fields"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        self._port.__exit__(kind, error, trace)

    def settle(self) -> None:
        """Have all that waits looked at now, as :meth:`compute` does first."""
        self._port.settle()

    def compute(self, lens: "int | str | Lens" = 0, where: "Callable[[Site], bool] | None" = None) -> "LensResult":
        """The result of a lens so far.

        Args:
            lens: its number, its slug or spec as it was given, or the lens itself.
            where: which sites count; all when None.

        Raises:
            UserError: no such lens looks here, or it saw nothing.
        """
        from ..errors import UserError

        for i, mine in enumerate(self.lenses):
            if lens in (i, mine.slug, mine.spec) or lens is mine:
                kept = self._port.kept(self._bundle)
                seen = self._bundle.of(i, [one for one in kept if where is None or where(one[0])])
                if not seen:
                    raise UserError(f"{mine.spec} saw nothing: the model ran no attention that it looks at")
                return mine.compute(seen)
        raise UserError(f"{lens!r} does not look here; these do: {', '.join(mine.spec for mine in self.lenses)}")


def watch(model: "torch.nn.Module", *lenses: "Lens | str", roles: "TokenSpans | None" = None) -> Watching:
    """Look at a model with lenses for as long as a ``with`` block lasts; nothing it computes changes by a bit.

        with manyheads.watch(model, "active_dormant", "reasoning_rhythm") as seen:
            model(**inputs)
        seen.compute("active_dormant").tables["sink"].top(5)

    Args:
        model: a transformers model, or a module that contains one.
        lenses: strategies of the lenses category, or their specs; they share the weights of a call.
        roles: which tokens are ``system``, ``response`` and so on; lenses that need a role name it.

    Raises:
        UserError: one of them is no lens, or as in :func:`manyheads.use`.
    """
    from ..causal_lens import CausalLens
    from ..errors import UserError
    from ..lens import Lens
    from ..spec import parse

    if not lenses:
        raise UserError("name at least one lens: `manyheads list --category lenses`")
    chosen: list[Any] = [parse(lens) for lens in lenses]
    for strategy in chosen:
        if isinstance(strategy, CausalLens):
            raise UserError(f"{strategy.spec} asks prompts of its own: `manyheads inspect`, or its method locate")
        if not isinstance(strategy, Lens) or strategy.edits_model:
            raise UserError(f"{strategy.spec} acts on the model and does not only look: open it with manyheads.use")
    return Watching(model, tuple(chosen), roles)
