# SPDX-License-Identifier: Apache-2.0
"""Whether strategies acted in every run of a denoiser, wherever they were to act."""

from collections.abc import Collection, Sequence

from ..errors import UserError
from ..strategy import DenoiserPrediction, Strategy
from .hook_chain import BoundStrategy
from .sdpa_patch import SiteState

__all__ = ["RunCheck"]

Expected = tuple[int, SiteState, BoundStrategy]


class RunCheck:
    """Compares what acted in a run with what was to act there: all that a port has in the denoisers that were called.

    Attributes:
        expected: of every site, the denoiser (by ``id``) and the strategies.
    """

    def __init__(self) -> None:
        self.expected: Sequence[Expected] = ()
        self._run: int | None = None
        self._denoisers: set[int] = set()
        self._predicted: set[tuple[int, int]] = set()
        self._acted: set[int] = set()
        self._missed: str | None = None

    def see(self, run: int, denoiser: int, failed: Collection[int]) -> None:
        """Take note of a call of a denoiser."""
        if run != self._run:
            self.end(failed)
            self._run = run
        self._denoisers.add(denoiser)

    def predicted(self, strategy: Strategy, denoiser: int) -> None:
        """Take note that a strategy made a prediction of a denoiser."""
        self._predicted.add((id(strategy), denoiser))

    def end(self, failed: Collection[int]) -> None:
        """End the run at hand; one that ``failed`` is not looked at."""
        if self._run is not None and self._run not in failed and self._missed is None:
            self._missed = next((self._missing(*each) for each in self.expected if self._misses(*each)), None)
        self._acted |= {id(entry) for _, _, entry in self.expected if entry.called}
        for _, _, entry in self.expected:
            entry.called = False
        self._run, self._denoisers, self._predicted = None, set(), set()

    def check(self, idle: int, name: str) -> None:
        """Raise UserError where a strategy did not act in a run, or nowhere at all.

        Args:
            idle: calls of the pipeline in which none of the denoisers was called.
            name: of the pipeline.
        """
        for _, state, entry in self.expected:
            never = not entry.called and id(entry) not in self._acted
            if never and entry.strategy.selects(state.last or state.site):
                raise UserError(
                    f"{entry.strategy.spec} selected {state.site.name}, and its attention was never seen: the "
                    "model did not run it in the block, or by a processor without SDPA (sliced, xformers), or it was "
                    "compiled after the port was opened; compile it before"
                )
        if self._missed is not None:
            raise UserError(self._missed)
        if idle and self.expected:
            raise UserError(
                f"{name} was called and did not call the denoiser it had when the port was opened ({idle} times); "
                "put parts in their place before, and open the port then"
            )

    def _misses(self, denoiser: int, state: SiteState, entry: BoundStrategy) -> bool:
        if denoiser not in self._denoisers or not entry.strategy.selects(state.last or state.site):
            return False
        guides = isinstance(entry.strategy, DenoiserPrediction)
        return not entry.called or (guides and (id(entry.strategy), denoiser) not in self._predicted)

    def _missing(self, denoiser: int, state: SiteState, entry: BoundStrategy) -> str:
        where = f"run {self._run} of the denoiser and did not act there at {state.site.name}"
        return (
            f"{entry.strategy.spec} was open in {where}: its modules or their attention were replaced meanwhile; open "
            "the port anew after that"
        )
