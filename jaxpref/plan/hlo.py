"""The collectives of a step, read from the text of a compiled program.

A plain search for `all-gather` would miscount, for four reasons:

- A collective in a loop runs once per iteration.
- The TPU compiler may express a reduce-scatter as a fusion around an all-reduce, of
  which every chip keeps a part: half the bytes.
- A collective that overlaps with products is split over several fusions, all with the
  same channel.
- The program is that of one slice.  Communication between slices appears as a `send`
  and a `recv` with attributes for the runtime (Megascale).
"""

import dataclasses
import math
import re
from collections import Counter

WIDTHS = {
    "pred": 1,
    **{f"{sign}{bits}": bits / 8 for sign in "su" for bits in (2, 4, 8, 16, 32, 64)},
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "f64": 8,
    "c64": 8,
    "c128": 16,
}
"""Bytes per element; the names of all eight-bit floats begin with f8."""
KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
HALVED = "all-reduce-scatter"
"""Part of the name of a fusion that keeps only a part of its all-reduce."""
PIECES = "async_collective_fusion"
"""Part of the name of a fusion that runs a piece of a collective during products."""
BETWEEN = " between slices"
"""Suffix of the kinds of collectives that use the data center network."""

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
# The attributes of a kernel span several lines, the last of which begins with }}.
_END = re.compile(r"^\}(?!\})")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Line:
    """One instruction."""

    name: str
    type: str
    """Type of the result, with its layout."""
    opcode: str
    rest: str
    """Operands and attributes."""

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        depth = 1
        for end, letter in enumerate(self.rest):
            depth += (letter == "(") - (letter == ")")
            if not depth:
                return _NAME.findall(self.rest[:end])
        return _NAME.findall(self.rest)

    def called(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute lists."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return _NAME.findall(match[1]) if match else []


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program."""

    name: str
    lines: dict[str, Line]
    root: str


def collectives(
    text: str, *, devices: int, slices: int = 1, turns: int = 1
) -> dict[str, dict[str, float]]:
    """Counts the collectives that one device executes in one run of the program.

    Of the branches of a conditional, the one that communicates most is counted.
    Products that are computed while the weights arrive in a ring appear as
    `collective-permute`.

    Args:
      text: text from `jax.stages.Compiled.as_text`.
      devices: devices per slice.
      slices: number of slices.
      turns: assumed iterations of a loop whose end depends on computed values.

    Returns:
      For each kind (one of `KINDS`, with the suffix `BETWEEN` between slices): `count`;
      `bytes` of the gathered, reduced, or exchanged array; and `wire_bytes` that a
      device receives in a ring of n devices or slices.  These are (n-1)/n of the bytes,
      twice that for an all-reduce, and all of them for a permutation.
    """
    computations, entry = parse(text)
    total: dict[str, dict[str, float]] = {}
    found = _collect(computations, entry, (devices, slices), turns)
    for times, kind, figures in found.values():
        into = total.setdefault(kind, dict.fromkeys(figures, 0))
        for key, value in figures.items():
            into[key] += times * value
    return total


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the entry computation."""
    found, entry, name, lines, root = {}, "", None, {}, ""
    for written in text.splitlines():
        if head := _HEAD.match(written):
            name, lines, root = head[2], {}, ""
            entry = name if head[1] else entry
        elif _END.match(written) and name is not None:
            found[name] = Computation(name, lines, root)
            name = None
        elif name is not None and (line := _LINE.match(written)):
            lines[line[2]] = Line(*line.groups()[1:])
            root = line[2] if line[1] else root
    return found, entry


def _collect(
    computations, name: str, sizes: tuple[int, int], turns: int = 1
) -> dict[tuple[str, str], tuple[int, str, dict]]:
    """Collectives of a computation: how often each runs, its kind, and its figures.

    The keys are channel, groups, and size, and the position in the program.  All pieces
    of a collective that is split over fusions (`PIECES`) count as one, even if some are
    outside a loop and some inside.  `sizes` are the devices per slice and the slices.
    """
    total: dict[tuple[str, str], tuple[int, str, dict]] = {}

    def visit(name: str, halved: bool, piece: bool = False):
        computation, here = computations[name], Counter()
        for line in computation.lines.values():
            if line.opcode == "while":
                (body,) = line.called("body")
                times = trip_count(line, computation, computations)
                times = turns if times is None else times
                inside = _collect(computations, body, sizes, turns)
                for channel, (n, kind, figures) in inside.items():
                    total.setdefault(channel, (n * times, kind, figures))
            elif line.opcode == "conditional":
                branches = line.called("branch_computations") or [
                    *line.called("true_computation"),
                    *line.called("false_computation"),
                ]
                options = [_collect(computations, b, sizes, turns) for b in branches]
                for channel, one in max(options, key=_received, default={}).items():
                    total.setdefault(channel, one)
            elif line.opcode in ("fusion", "call", "async-start", "custom-call"):
                of_kernel = line.called("called_computations")
                of_call = line.called("calls") or line.called("to_apply")
                for called in of_call or of_kernel:
                    if called in computations:
                        names = f"{line.name} {called}"
                        visit(
                            called,
                            halved or HALVED in names,
                            piece or PIECES in names,
                        )
            elif (kind := _kind(line)) is not None:
                kind, figures = _figures(line, kind, halved, *sizes)
                which = re.findall(r"\b(?:channel_id|replica_groups)=\S+", line.rest)
                which = f"{kind} {figures['bytes']} {which or name + line.name}"
                # Several collectives of one computation may share a channel.
                here[which] += 1
                # Pieces get one key, whichever comes first in the text.
                if figures["bytes"]:
                    where = "" if piece else f"{name} {line.name}"
                    total[f"{which} {here[which]}", where] = (1, kind, figures)

    visit(name, HALVED in name)
    spread = {which for which, where in total if not where}
    return {
        (which, where): one
        for (which, where), one in total.items()
        if not where or which not in spread
    }


def _received(found: dict[tuple[str, str], tuple[int, str, dict]]) -> float:
    return sum(times * figures["wire_bytes"] for times, _, figures in found.values())


def wire_bytes(
    found: dict[str, dict[str, float]], *, between_slices: bool = False
) -> float:
    """Total bytes that a device receives, within its slice or from other slices."""
    return sum(
        figures["wire_bytes"]
        for kind, figures in found.items()
        if kind.endswith(BETWEEN) == between_slices
    )


def _kind(line: Line) -> str | None:
    """The kind of collective that a line starts, or None."""
    if line.opcode == "recv" and (transfer := _TRANSFER.search(line.rest)):
        kind = transfer[1].lower().replace("_", "-")
        return (kind if kind in KINDS else "collective-permute") + BETWEEN
    kind = line.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _figures(
    line: Line, kind: str, halved: bool, devices: int, slices: int
) -> tuple[str, dict]:
    """The kind of one collective, and its `count`, `bytes`, and `wire_bytes`."""
    between = BETWEEN if kind.endswith(BETWEEN) else ""
    kind = kind.removesuffix(BETWEEN)
    group = slices if between else group_size(line.rest, devices)
    arrays = [size for size, _ in _arrays(line.type)]
    # The result of a start includes the operands: (operands, results, contexts).
    if line.opcode == "all-gather-start":
        arrays = arrays[len(arrays) // 2 :]
    elif line.opcode == "collective-permute-start":
        arrays = arrays[1:2]
    elif between:
        arrays = arrays[:1]  # (result, context, token)
    size = sum(arrays)
    if kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and halved:
        kind = "reduce-scatter"
    share = (group - 1) / group
    share = {"all-reduce": 2 * share, "collective-permute": 1}.get(kind, share)
    if not share:
        size = 0  # a group of one device
    return kind + between, {"count": 1, "bytes": size, "wire_bytes": share * size}


def _arrays(type: str) -> list[tuple[float, str]]:
    """Bytes and element type of each array of a type."""
    found = []
    for element, shape in _ARRAY.findall(type):
        width = WIDTHS.get(element, 1 if element.startswith("f8") else None)
        if width is not None:
            sizes = [int(size) for size in shape.split(",") if size]
            found.append((width * math.prod(sizes), element))
    return found


def group_size(rest: str, devices: int) -> int:
    """Number of devices in each group of a collective."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        named = re.findall(r"'(\w+)'", match[2])
        return math.prod(int(sizes[axis]) for axis in named)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    return devices


def trip_count(
    loop: Line, caller: Computation, computations: dict[str, Computation]
) -> int | None:
    """Iterations of a loop: as annotated, or from its counter, bound, and step.

    None if unknown, as for a loop whose end depends on computed values.
    """
    if match := re.search(r'known_trip_count":?\{"n":"(\d+)"', loop.rest):
        return int(match[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    condition, body = computations[condition], computations[body]
    initial = caller.lines.get(loop.operands[0])
    start = initial.operands if initial and initial.opcode == "tuple" else []
    following = body.lines[body.root].operands if body.root in body.lines else []

    def constant(name: str, inside: Computation) -> int | None:
        line = inside.lines.get(name)
        if line is None:
            return None
        if line.opcode == "constant":
            number = re.match(r"-?\d+", line.rest)
            return int(number[0]) if number else None
        if line.opcode in ("copy", "bitcast", "convert"):
            return constant(line.operands[0], inside)
        index = _index(line)
        if (
            index is None
            or inside is caller
            or index >= min(len(start), len(following))
        ):
            return None
        # A loop-invariant value equals its initial value.
        unchanged = _index(body.lines.get(following[index])) == index
        return constant(start[index], caller) if unchanged else None

    test = condition.lines.get(condition.root)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
        return None
    counter, bound = test.operands
    index, bound = _index(condition.lines.get(counter)), constant(bound, condition)
    if index is None or bound is None or index >= min(len(start), len(following)):
        return None
    first, steps = constant(start[index], caller), [1]
    after = body.lines.get(following[index])
    if after is not None and after.opcode == "add":
        steps = [constant(operand, body) for operand in after.operands]
    step = next((s for s in steps if s), 1)
    return max(-(-(bound - (first or 0)) // step), 0)


def _index(line: Line | None) -> int | None:
    """The tuple index that a line reads, or None."""
    if line is None or line.opcode != "get-tuple-element":
        return None
    match = re.search(r"index=(\d+)", line.rest)
    return int(match[1]) if match else None
