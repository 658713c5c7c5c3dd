"""What chips say to each other in a step, read from the text of a compiled program.

Four things make a plain search for `all-gather` wrong.  What stands in a loop is
carried out as often as the loop turns.  A reduce-scatter of the TPU compiler may be a
fusion that holds an all-reduce, of which every chip keeps a part: half the bytes.  And
one that runs beside products is spread over several fusions, all with its channel.
The program is that of one slice, and what slices say to each other is a pair of `send`
and `recv` with attributes for the runtime (Megascale) that carries it.
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
"""Bytes of an element; the kinds of eight-bit floats all begin with f8."""
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
"""In the name of a fusion that keeps a part of the all-reduce in it."""
PIECES = "async_collective_fusion"
"""In the name of a fusion that carries out a part of one, beside products."""
BETWEEN = " between slices"
"""Ends the kinds of what goes over the network of the data center."""

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
# Attributes of a kernel are written over several lines, the last of which is }}, ...
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
    """Of the result, with its layout."""
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
        """Names of the computations of an attribute: one, or several in braces."""
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
    """Collectives by kind, as one device carries them out in one run of the program.

    A branch counts where it is the one that says most.  Products that are computed ring
    by ring while the weights arrive show up as `collective-permute`.

    Args:
      text: from `jax.stages.Compiled.as_text`.
      devices: of a slice.
      slices: how many there are.
      turns: of a loop that ends by what it computes.

    Returns:
      For each kind, of `KINDS` or one of them `BETWEEN`, `count`; `bytes`, of the
      gathered, reduced or exchanged array; and `wire_bytes`, what a device receives in
      a ring of n devices, or slices: (n-1)/n of the bytes, twice that for an
      all-reduce, all of them for a permutation.
    """
    computations, entry = parse(text)
    total: dict[str, dict[str, float]] = {}
    found = _of(computations, entry, (devices, slices), turns)
    for times, kind, figures in found.values():
        into = total.setdefault(kind, dict.fromkeys(figures, 0))
        for key, value in figures.items():
            into[key] += times * value
    return total


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and which one is the program."""
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


def _of(
    computations, name: str, sizes: tuple[int, int], turns: int = 1
) -> dict[tuple[str, str], tuple[int, str, dict]]:
    """Those of the program, or of the body of a loop: how often, kind, and figures.

    By channel, groups and size, and by where it stands.  Of one that is spread over
    fusions (`PIECES`) all pieces are one, also where it is begun outside of a loop and
    goes on in it.  `sizes` are the devices of a slice and the slices.
    """
    total: dict[tuple[str, str], tuple[int, str, dict]] = {}

    def visit(name: str, halved: bool, piece: bool = False):
        computation, here = computations[name], Counter()
        for line in computation.lines.values():
            if line.opcode == "while":
                (body,) = line.called("body")
                times = trip_count(line, computation, computations)
                times = turns if times is None else times
                inside = _of(computations, body, sizes, turns)
                for channel, (n, *one) in inside.items():
                    total.setdefault(channel, (n * times, *one))
            elif line.opcode == "conditional":
                branches = line.called("branch_computations") or [
                    *line.called("true_computation"),
                    *line.called("false_computation"),
                ]
                options = [_of(computations, b, sizes, turns) for b in branches]
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
                kind, figures = _one(line, kind, halved, *sizes)
                which = re.findall(r"\b(?:channel_id|replica_groups)=\S+", line.rest)
                which = f"{kind} {figures['bytes']} {which or name + line.name}"
                # One channel may serve several, which then stand side by side.
                here[which] += 1
                # Outside before inside, whichever comes first in the text.
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
    """What a device receives in all, of its own slice or of the others."""
    return sum(
        figures["wire_bytes"]
        for kind, figures in found.items()
        if kind.endswith(BETWEEN) == between_slices
    )


def _kind(line: Line) -> str | None:
    """Which collective a line begins."""
    if line.opcode == "recv" and (transfer := _TRANSFER.search(line.rest)):
        kind = transfer[1].lower().replace("_", "-")
        return (kind if kind in KINDS else "collective-permute") + BETWEEN
    kind = line.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _one(
    line: Line, kind: str, halved: bool, devices: int, slices: int
) -> tuple[str, dict]:
    """Kind, and `count`, `bytes` and `wire_bytes` of one collective."""
    between = BETWEEN if kind.endswith(BETWEEN) else ""
    kind = kind.removesuffix(BETWEEN)
    group = slices if between else group_size(line.rest, devices)
    arrays = [size for size, _ in _arrays(line.type)]
    # Begun here, it gives its operands too: (operands, results, marks).
    if line.opcode == "all-gather-start":
        arrays = arrays[len(arrays) // 2 :]
    elif line.opcode == "collective-permute-start":
        arrays = arrays[1:2]
    elif between:
        arrays = arrays[:1]  # (result, mark, token)
    size = sum(arrays)
    if kind == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and halved:
        kind = "reduce-scatter"
    share = (group - 1) / group
    share = {"all-reduce": 2 * share, "collective-permute": 1}.get(kind, share)
    if not share:
        size = 0  # of a device with itself
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
    """How many devices take part together."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        named = re.findall(r"'(\w+)'", match[2])
        return math.prod(int(sizes[axis]) for axis in named)
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return match[1].count(",") + 1
    return devices


def trip_count(loop: Line, caller: Computation, computations) -> int | None:
    """How often a loop turns: as noted, or from its counter, its bound and its step.

    None where neither is known, as of a loop that ends by what it computes.
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
        # What a loop carries round unchanged is what came in.
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
    """Which part of a tuple is read."""
    if line is None or line.opcode != "get-tuple-element":
        return None
    match = re.search(r"index=(\d+)", line.rest)
    return int(match[1]) if match else None
