"""A search for the factor on a model's steps that makes its artifact fill a budget of bytes, and never exceed it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from numpy.typing import NDArray

from pgolf.errors import PgolfError

TRIES = 8  # most solves in search of a budget; three usually do
SLACK = 2000  # a budget counts as filled to 1 part in so many: 8,000 of 16,000,000 bytes
LEAST_SLACK, MOST_SLACK = 512, 8_000  # bytes; sizes of small models jump by a hundred

State = dict[str, NDArray[Any]]


def window(budget: int) -> tuple[int, int]:
    """The sizes that count as filling `budget` bytes."""
    return budget - min(max(budget // SLACK, LEAST_SLACK), MOST_SLACK), budget


class Try(NamedTuple):
    """One solve of the whole model."""

    octaves: float  # log2 of the factor on all steps
    size: int  # bytes it came to


class Search:
    """Looks for the factor whose size, falling in it, fills a budget.

    `model(octaves)` estimates the size but for `fixed` bytes; the tries correct both. `bounds` are the finest and the
    coarsest factor. Ask `next` for a factor to try, `tell` what it gave; `next` gives None at the end. `outcome` then
    says "filled", or "finest" when the smallest steps leave room, or "closest" when the tries ran out; PgolfError when
    even the largest steps are too large. Of the budget `room` bytes are left free.
    """

    def __init__(
        self,
        model: Callable[[float], float],
        fixed: float,
        bounds: tuple[float, float],
        budget: int,
        room: int = 0,
    ) -> None:
        self.model, self.fixed, self.bounds, self.budget = model, fixed, bounds, budget
        self.low, self.high = window(budget - room)
        self.tries: list[Try] = []
        self.outcome = "closest"

    def tell(self, octaves: float, size: int) -> None:
        self.tries.append(Try(octaves, size))

    @property
    def best(self) -> Try | None:
        """The largest size so far that is not too large."""
        return max((one for one in self.tries if one.size <= self.high), key=lambda one: one.size, default=None)

    def report(self) -> dict[str, Any]:
        """How it ended, as JSON."""
        return {"outcome": self.outcome, "tries": [list(one) for one in self.tries]}

    def next(self) -> float | None:
        finest, coarsest = self.bounds
        best = self.best
        if best is not None and best.size >= self.low:
            self.outcome = "filled"
            return None
        if best is not None and best.octaves <= finest:
            self.outcome = "finest"
            return None
        if best is not None and len(self.tries) >= TRIES:
            return None
        over = max((one.octaves for one in self.tries if one.size > self.high), default=-math.inf)
        under = min((one.octaves for one in self.tries if one.size < self.low), default=math.inf)
        if over >= coarsest:
            least = min(one.size for one in self.tries)
            raise PgolfError(
                f"even the coarsest steps make {least:,.0f} bytes, the budget is {self.budget:,.0f}; "
                "raise quantize.budget or train a smaller model"
            )
        if len(self.tries) >= TRIES:  # nothing fits yet: step back faster and faster, and at last to the end
            return min(coarsest, over + 0.1 * 4.0 ** (len(self.tries) - TRIES))
        wanted = self._guess()
        if not over < wanted < under:  # the sizes are less smooth than the model
            step = 0.05 * 2.0 ** len(self.tries)
            if math.isinf(under):
                wanted = over + step
            elif math.isinf(over):
                wanted = under - step
            else:
                wanted = (over + under) / 2
        return min(max(wanted, finest), coarsest)

    def _guess(self) -> float:
        """Where the model, fitted to the nearest one or two tries, meets the middle of the window."""
        goal = (self.low + self.high) / 2
        nearest = sorted(self.tries, key=lambda one: abs(one.size - goal))[:2]
        offset, slope = self.fixed, 1.0
        if nearest:
            first = self.model(nearest[0].octaves)
            slope = max(nearest[0].size - offset, 1.0) / max(first, 1e-9)
            if len(nearest) == 2:
                between = first - self.model(nearest[1].octaves)
                secant = (nearest[0].size - nearest[1].size) / between if between else 0.0
                slope = secant if 0.1 * slope < secant < 10 * slope else slope
            offset = nearest[0].size - slope * first
        finest, coarsest = self.bounds
        for _ in range(60):
            middle = (finest + coarsest) / 2
            if offset + slope * self.model(middle) > goal:
                finest = middle
            else:
                coarsest = middle
        # The finest end is reached exactly when the goal lies beyond it.
        return self.bounds[0] if coarsest - self.bounds[0] < 1e-6 else coarsest


def fill(search: Search, solve: Callable[[float], State], pack: Callable[[State], bytes]) -> tuple[State, bytes]:
    """Solve and pack until the search ends: the state of its best try, and what that packs to.

    `solve(octaves)` makes the state whose steps have the common factor 2^octaves.
    """
    best: tuple[State, bytes] = ({}, b"")
    while (octaves := search.next()) is not None:
        state = solve(octaves)
        packed = pack(state)
        search.tell(octaves, len(packed))
        if search.best == search.tries[-1]:
            best = state, packed
    return best
