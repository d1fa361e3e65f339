"""`pgolf inspect`: where an artifact's bytes go, weight by weight, and what another budget would change."""

import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pgolf import artifact, codec, files
from pgolf.errors import PgolfError

ACCOUNT = "quantize.json"  # beside an artifact: {"bytes": of the artifact, "matrices": {NAME: {"nats": lost}}}

SHORT = {"float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Weight:
    """One weight with all the arrays that make it up.

    Arrays that are no coded matrix share a stream with others of their type; `bytes` counts their part of it by size.
    """

    name: str
    form: str
    shape: tuple[int, ...]
    bytes: int
    level_bytes: int | None  # of its coded matrix alone, exact; None: it has none
    loss: float | None  # by quantization, if an account tells

    @property
    def role(self) -> str:
        return re.sub(r"^blocks\.[0-9]+\.", "", self.name).removesuffix(".weight")

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Role:
    """All layers' weights of one role."""

    name: str
    weights: int
    count: int
    bytes: int
    loss: float | None


@dataclass(frozen=True)
class WhatIf:
    """Another budget's effect on the coded matrices, all else the same: an estimate.

    At high rate a bit a weight divides the distortion by four, and the best distribution of bits gives or takes the
    same number of bits a weight everywhere.
    """

    bytes: int
    bits_per_weight_change: float
    distortion_factor: float


@dataclass(frozen=True)
class Report:
    """An artifact's bytes by weight; table, source and container are the rest."""

    path: Path
    bytes: int
    weights: list[Weight]
    table: int
    source: int
    container: int
    note: str  # what a reader should know about the losses; may be empty

    def roles(self) -> list[Role]:
        """Largest first."""
        groups: dict[str, list[Weight]] = {}
        for weight in self.weights:
            groups.setdefault(weight.role, []).append(weight)
        result = []
        for name, group in groups.items():
            losses = [weight.loss for weight in group if weight.loss is not None]
            total = sum(losses) if losses else None
            count, size = sum(weight.count for weight in group), sum(weight.bytes for weight in group)
            result.append(Role(name, len(group), count, size, total))
        return sorted(result, key=lambda role: (-role.bytes, role.name))

    def loss(self) -> float | None:
        """All losses; None where none is known, or nothing is lost."""
        return sum(weight.loss or 0.0 for weight in self.weights) or None

    def what_if(self, budget: int) -> WhatIf:
        """PgolfError where the budget leaves nothing to the coded matrices."""
        count = sum(weight.count for weight in self.weights if weight.level_bytes is not None)
        coded = sum(weight.level_bytes or 0 for weight in self.weights)
        if not count:
            raise PgolfError(f"{self.path} holds no coded matrix: another budget would change nothing")
        if coded + budget <= self.bytes:
            raise PgolfError(
                f"--what-if {budget}: all but the coded matrices takes {self.bytes - coded:,} bytes; ask for more"
            )
        change = 8 * (budget - self.bytes) / count
        return WhatIf(budget, change, 2.0 ** (-2 * change))


def bits(size: int | None, count: int) -> float | None:
    """Bits a number; None where there are no numbers."""
    return 8 * size / count if size is not None and count else None


def trellis_states(q: NDArray[np.int8]) -> int | None:
    """States of the first trellis that every column of q [rows, columns] obeys; None: no trellis, or only zeros.

    A trellis is a convolutional code: an entry's parity is the sum, modulo 2, of some of the two lowest bits of the
    entries above it (`pgolf.quantize.trellis`), those that its polynomials name.
    """
    if not q.any():
        return None
    low, high = q & 1, (q >> 1) & 1
    for states, polynomials in codec.TRELLISES.items():
        parity = np.zeros_like(low)
        for plane, polynomial in zip((low, high), polynomials, strict=True):
            for back in range(1, polynomial.bit_length()):
                if polynomial >> back & 1:
                    parity[back:] ^= plane[:-back]
        if (parity == low).all():
            return states
    return None


def inspect(path: Path) -> Report:
    """Read an artifact and the account beside it; PgolfError on a file that is missing, damaged or of another kind."""
    packed, sizes, matrices = artifact.measure(path)
    total = path.stat().st_size
    losses, note = _account(path, total)
    coded = matrices | dict(_shared(packed.state, sizes, matrices))
    parts: dict[str, list[str]] = {}
    for key in packed.state:
        parts.setdefault(_owner(key, packed.state), []).append(key)
    weights = []
    for name, keys in parts.items():
        key = next(key for key in (f"{name}.q", f"{name}.gq", name) if key in packed.state)
        size = sum(coded[key] for key in keys)
        form = _form(name, packed.state)
        weights.append(Weight(name, form, packed.state[key].shape, size, matrices.get(key), losses.get(name)))
    return Report(path, total, weights, sizes["table"], sizes["source"], sizes["container"], note)


def _owner(key: str, state: dict[str, NDArray[Any]]) -> str:
    """The weight that an array belongs to: NAME of NAME.q, NAME.scale and so on, or itself."""
    name = key.rpartition(".")[0]
    return name if f"{name}.q" in state or f"{name}.gq" in state else key


def _shared(
    state: dict[str, NDArray[Any]], sizes: dict[str, int], matrices: dict[str, int]
) -> Iterator[tuple[str, int]]:
    """The other arrays' parts of the stream of their type, in proportion to their bytes; they add up to it."""
    by_type: dict[str, list[str]] = {}
    for key in state.keys() - matrices.keys():
        by_type.setdefault(state[key].dtype.name, []).append(key)
    for dtype, keys in by_type.items():
        keys.sort()
        whole = sum(state[key].nbytes for key in keys)
        before = done = 0
        for key in keys:
            done += state[key].nbytes
            end = round(sizes[dtype] * done / whole) if whole else sizes[dtype]
            yield key, end - before
            before = end


def _form(name: str, state: dict[str, NDArray[Any]]) -> str:
    """In words, how a weight is stored."""
    if f"{name}.gq" in state:
        return "int8 by row"
    if f"{name}.q" not in state:
        return SHORT.get(state[name].dtype.name, state[name].dtype.name)
    q = state[f"{name}.q"]
    states = trellis_states(q) if q.dtype == np.int8 and q.ndim == 2 else None
    # GPTQ clips to a width that its integers need not use, so their range is what can be told.
    form = f"trellis {states}" if states else f"gptq {q.min(initial=0)}..{q.max(initial=0)}"
    extras = (("step", "column steps"), ("awqg_start", "protected"), ("lqA", "low rank"), ("lqA_a", "low rank"))
    return form + "".join(f" + {label}" for suffix, label in extras if f"{name}.{suffix}" in state)


def _account(path: Path, size: int) -> tuple[dict[str, float], str]:
    """Losses by weight from the account beside an artifact, and a note on them; none without an account."""
    account = path.with_name(ACCOUNT)
    if not account.exists():
        return {}, ""
    told = files.read_object(account)
    if told.get("bytes", size) != size:
        return {}, f"{account} tells of another artifact ({shown(str(told['bytes']))} bytes); its losses are left out"
    matrices = told.get("matrices", {})
    if not isinstance(matrices, dict):
        raise PgolfError(f"{account}: matrices must be an object; quantize again or remove the file")
    losses = {}
    for name, row in matrices.items():
        loss: Any = row.get("nats") if isinstance(row, dict) else None
        if type(loss) not in (int, float) or not 0 <= loss < math.inf:
            raise PgolfError(f"{account}: {shown(name)}: nats must be a number from 0; quantize again")
        losses[name] = float(loss)
    return losses, ""


def shown(name: str) -> str:
    """A name from a file, fit for a terminal."""
    return name if name.isprintable() else ascii(name)


def as_json(report: Report, what_if: WhatIf | None) -> dict[str, Any]:
    """The whole report; shares are of the file's bytes and of all losses."""
    loss = report.loss()

    def row(item: Weight | Role) -> dict[str, Any]:
        return dataclasses.asdict(item) | {
            "bits_per_weight": bits(item.bytes, item.count),
            "share": item.bytes / report.bytes,
            "loss_share": None if loss is None or item.loss is None else item.loss / loss,
        }

    return {
        "path": str(report.path),
        "bytes": report.bytes,
        "cap": artifact.CAP,
        "left": artifact.CAP - report.bytes,
        "weights": [row(weight) | {"role": weight.role, "count": weight.count} for weight in report.weights],
        "roles": [row(role) for role in report.roles()],
        "table": report.table,
        "source": report.source,
        "container": report.container,
        "note": report.note,
        "what_if": what_if and dataclasses.asdict(what_if),
    }


def show(report: Report, what_if: WhatIf | None) -> None:
    """Print the report as tables."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    loss = report.loss()
    weights = Table(title=shown(str(report.path)), title_justify="left")
    roles = Table(title="by role", title_justify="left")
    heads = ("bits a weight", "bytes", "share", *(("share of loss",) if loss else ()))
    for table, first in ((weights, ("weight", "form", "shape")), (roles, ("role", "weights", "numbers"))):
        for column in (*first, *heads, *(("bits then",) if what_if and table is roles else ())):
            words = column in ("weight", "form", "role")
            table.add_column(column, justify="left" if words else "right", overflow="fold")

    def numbers(item: Weight | Role) -> list[str]:
        rate = bits(item.bytes, item.count)
        cells = ["" if rate is None else f"{rate:.3f}", f"{item.bytes:,}", f"{item.bytes / report.bytes:.2%}"]
        if loss:
            cells.append("" if item.loss is None else f"{item.loss / loss:.2%}")
        return cells

    def add(table: Table, *cells: str) -> None:
        table.add_row(*(Text(cell) for cell in cells))  # as text: a name is no markup

    for weight in report.weights:
        add(weights, shown(weight.name), weight.form, " x ".join(map(str, weight.shape)), *numbers(weight))
    coded = {weight.role for weight in report.weights if weight.level_bytes is not None}
    for role in report.roles():
        cells = [shown(role.name), str(role.weights), f"{role.count:,}", *numbers(role)]
        if what_if and role.name in coded:
            rate = (bits(role.bytes, role.count) or 0.0) + what_if.bits_per_weight_change
            cells.append(f"{max(rate, 0.0):.3f}")
        add(roles, *cells)
    for name, size in (("source", report.source), ("table", report.table), ("container", report.container)):
        add(roles, f"({name})", "", "", "", f"{size:,}", f"{size / report.bytes:.2%}")
    out.print(weights)
    out.print(roles)
    left = artifact.CAP - report.bytes
    verdict = f"{left:,} to spare" if left >= 0 else f"{-left:,} bytes OVER"
    lines = [f"{report.bytes:,} bytes, weights and code, of the cap of {artifact.CAP:,}; {verdict}", report.note]
    if what_if:
        lines.append(
            f"at {what_if.bytes:,} bytes: {what_if.bits_per_weight_change:+.3f} bits a weight in coded matrices, "
            f"distortion x {what_if.distortion_factor:.4g} (estimate: 2^(-2 x bits), the rule at high rate)"
        )
    for line in filter(None, lines):
        out.print(line, markup=False, soft_wrap=True)


def plot(report: Report, path: Path) -> None:
    """Write a PNG: each role's share of bytes and losses, and the bits a number of each of its weights."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PgolfError("--plot needs matplotlib; install it with `pip install pgolf[plot]`") from error
    roles = report.roles()[::-1]  # the largest on top
    loss = report.loss()
    figure = Figure(figsize=(12, 1.5 + 0.35 * len(roles)), layout="constrained")
    shares, rates = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(roles))
    height = 0.4 if loss else 0.8
    share = [100 * role.bytes / report.bytes for role in roles]
    shares.barh(places + (0.2 if loss else 0), share, height, label="bytes")
    if loss:
        shares.barh(places - 0.2, [100 * (role.loss or 0.0) / loss for role in roles], height, label="loss")
        shares.legend()
    # Names come from the file: no $ in them begins a formula.
    shares.set_yticks(places, [shown(role.name) for role in roles], parse_math=False)
    shares.set_xlabel("share, %")
    where = {role.name: place for place, role in enumerate(roles)}
    dots = [(bits(weight.bytes, weight.count), where[weight.role]) for weight in report.weights if weight.count]
    rates.plot([rate for rate, _ in dots], [place for _, place in dots], "o", alpha=0.6)
    rates.set_xlabel("bits a number, all its parts counted")
    figure.suptitle(f"{shown(report.path.name)}: {report.bytes:,} of {artifact.CAP:,} bytes", parse_math=False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    files.write_bytes(path, image.getvalue())


def run(path: Path, json_only: bool = False, picture: Path | None = None, budget: int | None = None) -> None:
    """The command: print the report of one artifact, as tables or as JSON; write its picture when asked."""
    report = inspect(path)
    what_if = None if budget is None else report.what_if(budget)
    if picture is not None:
        plot(report, picture)
    if json_only:
        print(json.dumps(as_json(report, what_if), indent=2))
    else:
        show(report, what_if)
