"""What a command shows while it works: a live bar on a terminal, plain lines in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pgolf import parallel

out = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line, from rank 0 only."""
    if parallel.rank() == 0:
        out.print(text, markup=False)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, from rank 0 only. Where the terminal is narrow the first column wraps."""
    if parallel.rank() == 0:
        grid = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            grid.add_column(column, justify="left" if index == 0 else "right", no_wrap=index > 0)
        for row in rows:
            grid.add_row(*row)
        out.print(grid)


class Bar:
    """A progress bar on a terminal; elsewhere a line every `every` seconds. Update with a share and a text."""

    def __init__(self, name: str, every: float = 10.0) -> None:
        self.name, self.every = name, every
        self._live = sys.stdout.isatty() and parallel.rank() == 0
        self._started = time.perf_counter()
        self._last = float("-inf")

    def __enter__(self) -> "Bar":
        if self._live:
            text = TextColumn("{task.fields[text]}")
            self._progress = Progress("{task.description}", BarColumn(), text, TimeRemainingColumn(), console=out)
            self._progress.start()
            self._task = self._progress.add_task(self.name, total=1.0, text="")
        return self

    def update(self, share: float, text: str, elapsed: float | None = None) -> None:
        """Show that `share` (0 to 1) is done, after `elapsed` seconds of this work (default: since the bar began)."""
        if self._live:
            self._progress.update(self._task, completed=share, text=text)
            return
        now = time.perf_counter()
        if now - self._last >= self.every or share >= 1:
            worked = now - self._started if elapsed is None else elapsed
            left = f"  ETA {worked * (1 - share) / share:.0f} s" if 0.001 < share < 1 else ""
            say(f"{self.name}  {share:6.1%}  {text}{left}")
            self._last = now

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()
