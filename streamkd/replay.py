"""Prioritized memories of the past, drawn again while the present is learned."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from streamkd.sums import Index, Totals

LEAST = np.float32(1e-3)
"""Added to every loss: no priority is zero, so every record can be drawn again."""

Evict = Callable[["ReplayBuffer", int], Tensor]
"""Chooses the slots that `n` new records take; a slot of -1 turns a record away."""


@dataclass(frozen=True, eq=False, slots=True)
class Memories:
    """What was recalled.

    Attributes:
        slots: `[m]`, where each record lies in the buffer; to be handed back to `ReplayBuffer.update`.
        x: `[m, ...]`, raw, as it was stored.
        y: `[m]`.
        weights: `[m]`, importance weights, the largest of them 1.
        ages: `[m]`, in records learned since.
    """

    slots: Tensor
    x: Tensor
    y: Tensor
    weights: Tensor
    ages: Tensor

    def __len__(self) -> int:
        return self.slots.shape[0]

    def rows(self, rows: slice) -> "Memories":
        """Return some of them."""
        return Memories(self.slots[rows], self.x[rows], self.y[rows], self.weights[rows], self.ages[rows])


@dataclass(frozen=True, slots=True)
class Recall:
    """How the past is rehearsed.

    Attributes:
        updates: optimizer steps a batch, each with memories of its own; more of them after an alarm.
        records: memories drawn for each update.
        window: smallest window of latest records that they are drawn from: it is this long at an alarm, and then
            grows with the detector's. 0 draws from the whole buffer always.
        stride: records learned together: of a larger batch, one part after the other, each with as many steps.
    """

    updates: int = 2
    records: int = 32
    window: int = 256
    stride: int = 32


class ReplayBuffer:
    """Proportional prioritized replay (Schaul et al. 2016), vectorised over records.

    A record is drawn with probability P(i) = p_i ** alpha / sum p ** alpha and weighs (N P(i)) ** -beta over the
    largest such weight drawn. New records come in at the highest priority in the buffer. Priorities are capped at a
    running quantile, since on a stream the largest losses are mostly wrong labels.

    Args:
        capacity: in records; 0 remembers nothing.
        alpha: 0 draws uniformly, 1 in proportion to the priority.
        beta: importance weighting at the start, and again after each drift.
        beta_records: records over which beta rises to 1.
        evict: `ring`, `lowest` or `reservoir`.
        cap: the quantile of the priorities at which they are cut.
        seed: of the generator that draws.
    """

    def __init__(
        self,
        capacity: int = 2000,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        beta_records: int = 20_000,
        evict: "Evict | None" = None,
        cap: float = 0.95,
        seed: int = 0,
    ) -> None:
        self.capacity = capacity
        self.alpha = alpha
        self.beta_start = beta
        self.beta_records = beta_records
        self.evict = evict or ring
        self.cap = cap
        self.generator = torch.Generator().manual_seed(seed)
        self._empty()

    def _empty(self) -> None:
        """Remember nothing."""
        self.size = 0
        self.added = 0
        self.since_drift = 0
        self.ceiling = 0.0
        # Arrays, for on so few numbers numpy is the quicker one.
        self._priorities = np.zeros(self.capacity, np.float32)
        self._mass = Totals(self.capacity)  # priority ** alpha, in proportion to which records are drawn
        self._peaks = Totals(self.capacity, np.maximum)  # priorities
        self._births, self._y = np.zeros((2, self.capacity), np.int64)
        self._x: Tensor | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def priorities(self) -> Tensor:
        """`[capacity]`."""
        return torch.from_numpy(self._priorities)

    def priorities_at(self, slots: Tensor) -> Tensor:
        """Return the priorities `[m]` of what lies at `slots` `[m]` now."""
        return torch.from_numpy(self._priorities[slots.numpy()])

    @property
    def births(self) -> Tensor:
        """`[capacity]`, how many records had come before each."""
        return torch.from_numpy(self._births)

    @property
    def beta(self) -> float:
        """The importance weighting now."""
        share = min(1.0, self.since_drift / self.beta_records)
        return self.beta_start + (1 - self.beta_start) * share

    def add(self, x: Tensor, y: Tensor) -> None:
        """Remember the records `x` `[n, ...]` with their labels `y` `[n]`, at the highest priority."""
        n = y.shape[0]
        if not self.capacity or not n:
            return
        if self._x is None:
            self._x = x.new_zeros(self.capacity, *x.shape[1:])
        highest = self.highest or 1.0
        for start in range(0, n, self.capacity):
            self._add(x[start : start + self.capacity], y[start : start + self.capacity], highest)

    def _add(self, x: Tensor, y: Tensor, priority: float) -> None:
        n = y.shape[0]
        slots, births = self.evict(self, n), np.arange(self.added, self.added + n)
        self.added += n
        self.since_drift += n
        if self.evict is not ring:
            kept = (slots >= 0).nonzero()[:, 0]
            slots, births, x, y = slots[kept], births[kept.numpy()], x[kept], y[kept]
        memory = torch.as_tensor(self._x)
        places = slots.numpy()
        memory.index_copy_(0, slots, x.to(memory))
        self._y[places], self._births[places] = y.cpu().numpy(), births
        self._prioritise(places, priority)
        self.size = min(self.added, self.capacity)

    def begin_with(self, state: Mapping[str, Any]) -> None:
        """Remember the latest records of another buffer's state, as many as there is room for, at one priority."""
        if state["x"] is not None and self.capacity:
            latest = state["births"].argsort()[-self.capacity :]
            self.add(state["x"][latest], state["y"][latest])

    def sample(self, n: int, window: int | None = None) -> Memories:
        """Draw `n` memories with replacement, from the latest `window` records only where that is given."""
        if not self.size or self._x is None or n == 0:
            none = torch.zeros(0, dtype=torch.int64)
            return Memories(none, torch.zeros(0), none, torch.zeros(0), none)
        slots = self._draw(n, min(window or self.size, self.size))
        if not len(slots):
            return self.sample(0)
        places = slots.numpy()
        weights = self._mass[places] ** -self.beta  # N and the sum of the masses cancel in the next line
        weights = (weights / weights.max()).astype(np.float32)
        ages = self.added - self._births[places]
        recalled = self._x.index_select(0, slots)
        return Memories(slots, recalled, *map(torch.from_numpy, (self._y[places], weights, ages)))

    def _draw(self, n: int, window: int) -> Tensor:
        """Draw slots `[n]` of the latest `window` records, in proportion to their mass; none if they have none."""
        if window < self.size and self.evict is not ring:
            return self._draw_young(n, window)
        start, first = 0, 0.0
        total = everything = self._mass.total
        if window < self.size:  # the latest records lie in a row, which may go over the end of the buffer
            start = (self.added - window) % self.capacity
            first, end = self._mass.before(start), start + window
            total = (
                self._mass.before(end) if end <= self.capacity else everything + self._mass.before(end - self.capacity)
            )
            total -= first
        if total <= 0:
            return torch.zeros(0, dtype=torch.int64)
        depths = first + total * torch.rand(n, generator=self.generator, dtype=torch.float64).numpy()
        slots = self._mass.find(np.where(depths < everything, depths, depths - everything))
        inside = (slots - start) % self.capacity < window
        if not inside.all():  # by rounding, once in a very long while
            slots = np.where(inside, slots, slots[inside.argmax()])
        return torch.from_numpy(slots)

    def _draw_young(self, n: int, window: int) -> Tensor:
        """Likewise where the latest records lie anywhere; a reservoir may hold none so young."""
        mass = torch.from_numpy(self._mass[np.arange(self.size)])
        mass = mass * (self.births[: self.size] >= self.added - window)
        drawn = n if bool(mass.any()) else 0
        return torch.multinomial(mass, drawn, replacement=True, generator=self.generator) if drawn else mass[:0].long()

    @property
    def highest(self) -> float:
        """The highest priority in the buffer."""
        return self._peaks.total

    def _prioritise(self, places: Index, priorities: NDArray[np.float32] | float) -> NDArray[np.float32]:
        self._priorities[places] = priorities
        # Read back, for a slot that came twice has one of its two values.
        set_now = self._priorities[places]
        values = set_now.astype(np.float64)
        self._peaks[places] = values
        self._mass[places] = values**self.alpha if values.all() else np.where(values > 0, values**self.alpha, 0.0)
        return set_now

    def update(self, slots: Tensor, losses: Tensor) -> Tensor:
        """Refresh the priorities of what was recalled with the losses `[m]` it just had; return them."""
        if not len(slots):
            return torch.zeros(0)
        values = losses.numpy()
        if not isfinite(values.sum()):
            values = np.where(np.isfinite(values), values, 0)
        values = values + LEAST
        # A running quantile by stochastic steps in proportion to the typical loss: no sorting, no window.
        above = float(np.count_nonzero(values > self.ceiling)) / len(values)
        mean = float(values.sum()) / len(values)
        self.ceiling = max(self.ceiling + mean * 0.5 * (above - (1 - self.cap)), float(LEAST))
        return torch.from_numpy(self._prioritise(slots.numpy(), np.minimum(values, np.float32(self.ceiling))))

    def bar(self, slots: Tensor) -> None:
        """Never draw these records again: they break the peers."""
        self._prioritise(slots.numpy(), 0.0)

    def forget_schedule(self) -> None:
        """Start the annealing of the importance weights again: the world has changed."""
        self.since_drift = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the memories, their priorities, the counters and the state of chance."""
        return {
            "x": None if self._x is None else self._x[: self.size].clone(),
            "y": torch.from_numpy(self._y)[: self.size].clone(),
            "priorities": self.priorities[: self.size].clone(),
            "births": self.births[: self.size].clone(),
            "added": self.added,
            "since_drift": self.since_drift,
            "ceiling": self.ceiling,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._empty()
        self.size = len(state["y"])
        if state["x"] is not None:
            self._x = state["x"].new_zeros(self.capacity, *state["x"].shape[1:])
            self._x[: self.size] = state["x"]
        self._y[: self.size] = state["y"].numpy()
        self._prioritise(np.arange(self.size), state["priorities"].numpy())
        self._births[: self.size] = state["births"].numpy()
        self.added, self.since_drift, self.ceiling = state["added"], state["since_drift"], state["ceiling"]
        self.generator.set_state(state["generator"])


def ring(buffer: ReplayBuffer, n: int) -> Tensor:
    """The oldest make room."""
    return torch.from_numpy(np.arange(buffer.added, buffer.added + n) % buffer.capacity)


def lowest(buffer: ReplayBuffer, n: int) -> Tensor:
    """Those of the lowest priority make room (the articles that streamkd follows).

    It hoards what is hard, wrong labels included.
    """
    free = torch.arange(buffer.size, min(buffer.size + n, buffer.capacity))
    crowded = torch.topk(buffer.priorities[: buffer.size], n - len(free), largest=False).indices
    return torch.cat([free, crowded])


def reservoir(buffer: ReplayBuffer, n: int) -> Tensor:
    """Every record of the past has the same chance to be in the buffer (Vitter 1985)."""
    arrivals = buffer.added + torch.arange(n)
    places = (torch.rand(n, generator=buffer.generator, dtype=torch.float64) * (arrivals + 1)).long()
    slots = torch.where(arrivals < buffer.capacity, arrivals, places)
    # Of two records that chose one slot the later stays; writing both at once would leave it to chance.
    index = torch.arange(n)
    slots = slots.clamp(max=buffer.capacity)  # turned away
    last = torch.full((buffer.capacity + 1,), -1).scatter_reduce(0, slots, index, "amax")
    return torch.where((slots < buffer.capacity) & (last[slots] == index), slots, -1)
