# SPDX-License-Identifier: Apache-2.0
"""Groupings of tokens that stand on a grid, as the patches of an image do, behind tokens that stand for no patch.

Tokens are ``[prefix..., row 0, row 1, ...]``: those of the prefix (a class token, registers) stay groups of their own.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .merging import STEPS, Choice, Grouping
from .reference import widened

__all__ = ["behind", "matched_cells", "pooled_cells"]


def behind(prefix: int, grouping: Grouping) -> Grouping:
    """The grouping of tokens that stand behind ``prefix`` others, each of which stays alone."""
    if not prefix:
        return grouping
    into, count = grouping.into, grouping.count + prefix
    alone = torch.arange(prefix, device=into.device).expand(len(into), prefix)
    return Grouping(torch.cat([alone, into + prefix], 1), count)


def pooled_cells(
    batch: int, grid: tuple[int, int], cell: int, device: torch.device | str = "cpu", *, across: int = 0
) -> Grouping:
    """The tokens of each cell of ``cell x cell`` are a group, in reading order; at two edges perhaps fewer of them.

    Args:
        batch: rows.
        grid: height and width.
        cell: tokens of a cell's side.
        device: of the grouping.
        across: tokens of a cell's width where that is another than its height; 0 for the same.
    """
    (height, width), across = grid, across or cell
    at = torch.arange(height * width, device=device)
    wide = -(width // -across)
    into = at // width // cell * wide + at % width // across
    return Grouping(into.expand(batch, -1), wide * -(height // -cell))


def matched_cells(
    metric: Tensor, grid: tuple[int, int], cell: int, joins: int, *, reach: int = 0, choose: Choice = "similar"
) -> Grouping:
    """Bipartite soft matching on a grid (Token Merging for Stable Diffusion, Bolya and Hoffman, arXiv 2303.17604).

    The first token of every whole cell of ``cell x cell`` is a target, every other token looks for the target that is
    most like it by the cosine; those most like theirs join it, ``joins`` of them or all. Ties are as in
    :func:`.merging.matched`. The choice has no gradient.

    Args:
        metric: ``[B, N, d]`` by which tokens are compared.
        grid: height and width, N tokens in all.
        cell: tokens of a cell's side; no larger than the grid.
        joins: tokens that join another.
        reach: cells on each side of a token's own whose targets it is compared with, which costs in proportion to N;
            0 compares with all targets, in proportion to N squared.
        choose: ``random`` is a control: who joins is drawn by its place, and joins the target of its own cell.
    """
    height, width = grid
    rows, columns = height // cell, width // cell
    at = torch.arange(height * width)
    y, x = at // width, at % width
    is_target = (y % cell == 0) & (x % cell == 0) & (y < rows * cell) & (x < columns * cell)
    device, own = metric.device, torch.stack([(y // cell).clamp(max=rows - 1), (x // cell).clamp(max=columns - 1)])
    targets, sources = at[is_target].to(device), at[~is_target].to(device)
    home = own[:, ~is_target].to(device)
    unit = normalize(widened(metric.detach()), dim=2)
    if choose == "random":
        noise = (12.9898 * home[0] + 78.233 * sources).double().sin() * 43758.5453
        best = (noise - noise.floor()).expand(len(metric), -1)
        partner = (home[0] * columns + home[1]).expand(len(metric), -1)
    elif reach:
        best, partner = _nearby(unit[:, sources], unit[:, targets], home, (rows, columns), reach)
    else:
        best, partner = (unit[:, sources] @ unit[:, targets].mT * STEPS).round().max(2)
    order = best.argsort(dim=1, descending=True, stable=True)
    joined = order[:, :joins]
    stays = torch.ones(len(metric), height * width, dtype=torch.bool, device=device)
    stays.scatter_(1, sources[joined], False)
    place = stays.long().cumsum(1) - 1
    into = place.scatter(1, sources[joined], place.gather(1, targets[partner.gather(1, joined)]))
    return Grouping(into, height * width - joined.shape[1])


def _nearby(a: Tensor, b: Tensor, home: Tensor, cells: tuple[int, int], reach: int) -> tuple[Tensor, Tensor]:
    """Best rounded cosine and its target, among the targets of cells at most ``reach`` from ``home [2, Ns]``."""
    best = a.new_full(a.shape[:2], -torch.inf)
    partner = torch.zeros_like(best, dtype=torch.long)
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            y, x = home[0] + down, home[1] + right
            inside = (y >= 0) & (y < cells[0]) & (x >= 0) & (x < cells[1])
            target = y.clamp(0, cells[0] - 1) * cells[1] + x.clamp(0, cells[1] - 1)
            score = ((a * b[:, target]).sum(2) * STEPS).round().masked_fill(~inside, -torch.inf)
            better = score > best
            best = torch.where(better, score, best)
            partner = torch.where(better, target, partner)
    return best, partner
