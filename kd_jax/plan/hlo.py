"""Reads a compiled program's text (HLO): collectives, memory traffic, large arrays; loops as often as they run.

XLA's own cost analysis counts a loop's body once. Here every computation has the number of times that it runs: the trip
count that the compiler states, or that the loop's condition compares with; a loop whose count depends on data (the
head's, over chunks of scored tokens) runs `unknown` times, which the caller states.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator

_ARRAY = re.compile(r"\b(pred|token|opaque|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(r"(calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")

# Instructions that move nothing themselves.
SILENT = frozenset(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all partition-id replica-id "
    "opt-barrier all-gather-done all-reduce-done collective-permute-done async-update async-done copy-done send-done "
    "recv-done domain iota".split()
)
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True)
class Array:
    dtype: str
    shape: tuple[int, ...]
    space: int  # of memory; 0 is the chip's own (HBM)

    @property
    def bytes(self) -> int:
        if self.dtype in ("token", "opaque"):
            return 0
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype).group())
        size = 1
        for side in self.shape:
            size *= side
        return -(-size * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    kind: str
    arrays: tuple[Array, ...]  # of the result, a tuple's one by one
    operands: tuple[str, ...]
    inside: str  # what stands in its parentheses: operands, or a parameter's number, or a constant
    rest: str  # attributes
    root: bool

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    @property
    def label(self) -> str:
        """What the program calls the operation that this came from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found.group(1) if found else self.name


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, list[Op]]  # in the order of the text: what is called comes before its caller
    entry: str

    def ops(self, name: str) -> dict[str, Op]:
        return {op.name: op for op in self.computations[name]}


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`. Raises ValueError where there is no entry."""
    computations: dict[str, list[Op]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if header := _HEADER.match(line):
                current = computations[header.group(2)] = []
                entry = header.group(2) if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif op := _op(line):
            current.append(op)
    if not entry:
        raise ValueError("no ENTRY computation in this text: is it a compiled program?")
    return Module(computations, entry)


def _op(line: str) -> Op | None:
    found = _NAME.match(line)
    if not found:
        return None
    rest = line[found.end() :]
    stop = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:stop], rest[stop:].lstrip()
    start = rest.index("(")
    kind, stop = rest[:start], _closing(rest, start)
    arrays = tuple(_array(*m.groups()) for m in _ARRAY.finditer(shape))
    inside = rest[start + 1 : stop]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Op(found.group(2), kind, arrays, operands, inside, rest[stop + 1 :], bool(found.group(1)))


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in an instruction: {text[:80]}")


def _array(dtype: str, shape: str, layout: str | None) -> Array:
    space = re.search(r"S\((\d+)\)", layout or "")
    return Array(dtype, tuple(int(n) for n in shape.split(",") if n), int(space.group(1)) if space else 0)


# ----------------------------------------------------------------------------------------------------------- loops


def trips(op: Op, module: Module) -> int | None:
    """How often a `while` runs its body; None where that depends on data.

    From the compiler's own statement, or from a condition `counter < constant` and what the body adds to the counter,
    which begins at 0 (TPUs take two turns of a windowed product at a time, and count by twos).
    """
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.rest):
        return int(stated.group(1))
    condition, body = (module.ops(re.search(rf"{key}=%?([\w.\-]+)", op.rest).group(1)) for key in ("condition", "body"))
    root = next(o for o in condition.values() if o.root)
    compared = [condition[name] for name in root.operands if name in condition]
    if root.kind != "compare" or "direction=LT" not in root.rest:
        return None
    if [o.kind for o in compared] != ["get-tuple-element", "constant"]:
        return None
    counter, limit = int(re.search(r"index=(\d+)", compared[0].rest).group(1)), int(compared[1].inside)
    return -(-limit // _step(body, counter))


def _step(body: dict[str, Op], counter: int) -> int:
    """What one turn adds to a loop's counter; 1 where that cannot be read."""
    grown = body.get(next(o for o in body.values() if o.root).operands[counter])
    while grown is not None and grown.kind in ("copy", "bitcast"):
        grown = body.get(grown.operands[0])
    if grown is None or grown.kind != "add":
        return 1
    added = [body[name] for name in grown.operands if name in body and body[name].kind == "constant"]
    return int(added[0].inside) if added and int(added[0].inside) > 0 else 1


def counts(module: Module, unknown: int) -> dict[str, int]:
    """How often every computation runs in one execution of the program; that of a fusion as often as the fusion."""
    times: dict[str, int] = defaultdict(int, {module.entry: 1})
    for name in reversed(module.computations):
        for op in module.computations[name] if times[name] else ():
            factor = 1
            if op.kind == "while":
                found = trips(op, module)
                factor = unknown if found is None else found
            for called in _called(op):
                times[called] += factor * times[name]
    return times


def _called(op: Op) -> Iterator[str]:
    for attribute, name in _CALLED.findall(op.rest):
        # what a reduction or scatter applies to pairs of numbers is a part of it
        if attribute != "to_apply" or op.kind in ("call", "async-start"):
            yield name
    for names in _BRANCHES.findall(op.rest):
        yield from re.findall(r"[\w.\-]+", names)


def sequential(module: Module, unknown: int) -> Iterator[tuple[list[Op], int]]:
    """Computations whose instructions run one after the other, with how often; not the insides of fusions."""
    inside = {
        name
        for ops in module.computations.values()
        for op in ops
        if op.kind in ("fusion", "custom-call") or op.kind.startswith("async")
        for name in _called(op)
    }
    for name, times in counts(module, unknown).items():
        if times and name not in inside and name in module.computations:
            yield module.computations[name], times


# ----------------------------------------------------------------------------------------------------- collectives


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one execution, per chip."""

    count: int = 0
    bytes: float = 0.0  # that a chip sends, by a ring


def collectives(module: Module, chips: int, unknown: int = 1) -> dict[str, Traffic]:
    """Collectives by kind.

    Where the compiler cuts one into pieces that run beside the steps of an inner loop, its pieces share a channel: it
    counts as often as the piece that runs least, its start.
    """
    times = counts(module, unknown)
    best: dict[object, tuple[int, str, Op]] = {}
    for name, ops in module.computations.items():
        for op in ops if times[name] else ():
            if op.kind.removesuffix("-start") in COLLECTIVES:
                channel = re.search(r"channel_id=(\d+)", op.rest)
                key = int(channel.group(1)) if channel else (name, op.name)
                if key not in best or times[name] < best[key][0]:
                    best[key] = (times[name], name, op)
    out: dict[str, Traffic] = defaultdict(Traffic)
    for count, name, op in best.values():
        kind = op.kind.removesuffix("-start")
        # a TPU's reduce-scatter is a fusion of an all-reduce and the slice that is kept of it
        kind = "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in name else kind
        sent = _sent(kind, op, group_size(op.rest, chips))
        if sent:
            out[kind] = Traffic(out[kind].count + count, out[kind].bytes + count * sent)
    return dict(sorted(out.items(), key=lambda item: -item[1].bytes))


def _sent(kind: str, op: Op, group: int) -> float:
    """Bytes that a chip sends, by the shape of the result [bytes] and the size of the group that takes part."""
    share, size = (group - 1) / group, op.bytes
    if kind == "all-gather":  # a start's result is (operand, result)
        return share * (size * group / (group + 1) if op.kind.endswith("-start") else size)
    if kind == "collective-permute":
        return max((a.bytes for a in op.arrays), default=0)
    if kind == "reduce-scatter":
        return share * size if op.kind.startswith("all-reduce") else (group - 1) * size
    return {"all-reduce": 2.0}.get(kind, 1.0) * share * size


def group_size(attributes: str, chips: int) -> int:
    """Devices of one group, in any of the spellings of `replica_groups`; all chips where none are named."""
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(found.group(1))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        group = 1
        for axis, part in re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found.group(2)):
            group *= int(part or sizes[axis])
        return group
    return chips


# ---------------------------------------------------------------------------------------------------------- memory


def traffic(module: Module, unknown: int = 1) -> float:
    """Bytes that one execution reads from and writes to a chip's HBM: operands and results of its instructions.

    Of an operand that is sliced inside a fusion, or that is updated in place, the slice counts. What the compiler keeps
    in faster memory does not count. An estimate: caches may save some of it.
    """
    total = 0.0
    for ops, times in sequential(module, unknown):
        known = {op.name: op for op in ops}
        total += times * sum(_moved(op, known, module) for op in ops if op.kind not in SILENT)
    return total


def _moved(op: Op, known: dict[str, Op], module: Module) -> float:
    if op.kind in ("copy-start", "slice-start", "dynamic-slice-start"):  # result: (destination, source, ...)
        pair = op.arrays[:2]
        return min(a.bytes for a in pair) * sum(a.space == 0 for a in pair)
    operands = [known[name] for name in op.operands if name in known]
    if op.kind.endswith("-start") and op.kind.removesuffix("-start") in COLLECTIVES:  # the result repeats the operand
        return sum(map(_hbm, operands)) + max((a.bytes for a in op.arrays if a.space == 0), default=0)
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return _hbm(op) * 2
    if op.kind in ("dynamic-update-slice", "scatter"):
        return 2 * _hbm(operands[-1] if op.kind == "scatter" else operands[1]) if len(operands) > 1 else _hbm(op)
    if op.kind == "fusion" and (inner := module.computations.get(next(_called(op), ""))):
        return _fused(op, operands, inner)
    return _hbm(op) + sum(map(_hbm, operands))


def _fused(op: Op, operands: list[Op], inner: list[Op]) -> float:
    users: dict[str, list[Op]] = defaultdict(list)
    for user in inner:
        for name in user.operands:
            users[name].append(user)
    parameters = {int(o.inside): o for o in inner if o.kind == "parameter"}
    read = 0.0
    for i, operand in enumerate(operands):
        used = users[parameters[i].name] if i in parameters else []
        whole = _hbm(operand)
        if used and all(u.kind in ("dynamic-slice", "slice", "gather") for u in used):
            whole = min(whole, sum(u.bytes for u in used))
        elif used and all(u.kind == "dynamic-update-slice" and u.operands[0] == parameters[i].name for u in used):
            whole = 0.0
        read += whole
    by_name = {o.name: o for o in inner}
    roots = [o for o in inner if o.root]
    if roots and roots[0].kind == "tuple":
        roots = [by_name[name] for name in roots[0].operands if name in by_name]
    written = 0.0
    for array, root in zip(op.arrays, roots):
        while root.kind == "bitcast" and root.operands[0] in by_name:
            root = by_name[root.operands[0]]
        in_place = root.kind == "dynamic-update-slice" and root.operands[1] in by_name
        size = by_name[root.operands[1]].bytes if in_place else array.bytes
        written += size if array.space == 0 else 0
    return read + written


def _hbm(op: Op) -> int:
    return sum(a.bytes for a in op.arrays if a.space == 0)


def largest(module: Module, most: int = 5) -> list[tuple[Array, str]]:
    """The largest arrays in HBM that the program makes, with the operation that each came from."""
    found: dict[tuple[str, str], tuple[Array, str]] = {}
    for ops, _ in sequential(module, 1):
        for op in ops:
            if op.kind in SILENT or op.kind == "copy-start":
                continue
            for array in op.arrays:
                if array.space == 0:
                    found.setdefault((str(array), op.label), (array, op.label))
    return sorted(found.values(), key=lambda pair: -pair[0].bytes)[:most]
