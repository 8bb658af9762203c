"""What a compiler makes of a program: memory, products, traffic and collectives per chip, or why it cannot be had."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import re
import time

import jax
from jax.sharding import Mesh

from kd_jax.plan import count, hlo
from kd_jax.plan.chips import Chip, Topology
from kd_jax.plan.programs import Program, as_on, chip_bytes, leaves

GIB = 2.0**30


def versions() -> str:
    """Of the compilers: jax, and libtpu where it is installed."""
    known = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in known)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one execution of a program, per chip; bytes unless said otherwise."""

    kind: str
    label: str
    runs: tuple[str, ...]
    arguments: float
    resident: float  # held besides
    temporaries: float = 0.0
    results: float = 0.0  # that take no argument's place
    flop: float = 0.0  # of matrix products, as executed
    moved: float = 0.0  # to and from HBM
    collectives: dict[str, hlo.Traffic] = dataclasses.field(default_factory=dict)
    largest: tuple[str, ...] = ()
    tokens: int = 0  # of the batch, all chips, padding included
    rows: int = 0
    chunks: int = 1
    products: float = 1.0  # bfloat16 products that one of its products costs
    seconds: float = 0.0  # that the compiler took
    fault: str = ""  # of the compiler: what it said

    @property
    def peak(self) -> float:
        return self.arguments + self.resident + self.temporaries + self.results

    @property
    def sent(self) -> float:
        return sum(t.bytes for t in self.collectives.values())

    def times(self, chip: Chip) -> dict[str, float]:
        """Seconds that each of a chip's resources needs at its full rate: the roofline."""
        return {
            "compute": self.flop * self.products / chip.peak,
            "memory": self.moved / chip.bandwidth,
            "network": self.sent / chip.network,
        }

    def bound(self, chip: Chip) -> tuple[str, float]:
        """The resource that takes longest, and how long."""
        return max(self.times(chip).items(), key=lambda item: item[1])


def compile_chain(
    chain: list[Program], mesh: Mesh, topology: Topology, known: dict[str, Figures] | None = None
) -> list[Figures]:
    """Figures of a chain's programs; it ends with one that the compiler does not make.

    known: figures of programs that were compiled before, by a digest of program and topology; new ones are added.
    """
    found = []
    for program in chain:
        found.append(_figures(program, mesh, topology, {} if known is None else known))
        if program.made is not None and program.kind not in program.made:
            break
    return found


def _figures(program: Program, mesh: Mesh, topology: Topology, known: dict[str, Figures]) -> Figures:
    start = time.perf_counter()
    own = dict(
        kind=program.kind,
        label=program.label,
        runs=program.runs,
        resident=float(chip_bytes(program.resident)),
        tokens=program.tokens,
        rows=program.rows,
        chunks=program.chunks,
        products=_products(program, topology),
    )
    with as_on(topology.platform, mesh):
        traced = program.make()
        lowered = traced.lower()
    digest = _digest(lowered, own, mesh, topology)
    if digest in known and program.made is None:
        return dataclasses.replace(known[digest], **own)
    known[digest] = found = _compiled(program, mesh, traced, lowered, own)
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


def _digest(lowered, own: dict, mesh: Mesh, topology: Topology) -> str:
    size = {k: v for k, v in own.items() if k not in ("label", "runs")}
    facts = [lowered.as_text(), topology.name, sorted(mesh.shape.items()), sorted(size.items()), versions()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:20]


def _compiled(program: Program, mesh: Mesh, traced, lowered, own: dict) -> Figures:
    flop = count.flops(traced.jaxpr, program.chunks) / mesh.size
    earlier = program.made or {}
    arguments = float(chip_bytes((program.arguments, [tree for kind, tree in earlier.items() if kind != program.kind])))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        largest = _largest(program, traced, mesh)
        if (needed := out_of_memory(str(error))) is None:
            fault = " ".join(str(error).split())[:400]
            return Figures(**own, arguments=arguments, flop=flop, largest=largest, fault=fault)
        own |= dict(arguments=arguments, temporaries=max(0.0, needed - arguments))
        return Figures(**own, flop=flop, largest=largest)
    if program.made is not None:
        placed = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        program.made[program.kind] = jax.tree.map(placed, traced.out_info, compiled.output_shardings)
    memory, module = compiled.memory_analysis(), hlo.parse(compiled.as_text())
    return Figures(
        **own,
        arguments=float(memory.argument_size_in_bytes),
        temporaries=float(memory.temp_size_in_bytes + memory.generated_code_size_in_bytes),
        results=float(max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)),
        flop=flop,
        moved=hlo.traffic(module, program.chunks),
        collectives=hlo.collectives(module, mesh.size, program.chunks),
        largest=_largest(program, traced, mesh, module),
    )


# bfloat16 products that a product of float32 numbers costs. A TPU makes it of passes; a GPU takes TF32 (156 of 312
# TFLOP/s on an A100, 494.7 of 989.4 on an H100), and for `highest` no tensor core (19.5 of 312, 67 of 989).
FLOAT32 = {
    "tpu": {"default": 1.0, "high": 3.0, "highest": 6.0},
    "gpu": {"default": 2.0, "high": 2.0, "highest": 16.0},
}


def _products(program: Program, topology: Topology) -> float:
    """bfloat16 products that one of a program's products costs; of a CPU no rates are known."""
    return FLOAT32.get(topology.platform, {}).get(program.precision, 1.0) if program.float32 else 1.0


def out_of_memory(message: str) -> float | None:
    """Bytes that the compiler wanted, from its refusal; None where it failed for another reason.

    The total that it calls one of temporaries holds arguments and results too.
    """
    if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return None
    found = re.search(r"\(([\d.]+)([KMGT])\) exceeds|[Uu]sed ([\d.]+)([KMGT]) of", message)
    if not found:
        return float("inf")
    number, unit = [g for g in found.groups() if g]
    return float(number) * 1024.0 ** ("KMGT".index(unit) + 1)


def _largest(program: Program, traced, mesh: Mesh, module: hlo.Module | None = None) -> tuple[str, ...]:
    """The largest tensors, arguments by name, and what the program makes by the operation that makes it."""
    sized = [(size, f"{name} {_shape(shape)}") for size, name, shape in leaves(program.arguments)]
    sized += [(size, f"{name} {_shape(shape)}, held meanwhile") for size, name, shape in leaves(program.resident)]
    if module is not None:
        sized += [(a.bytes, f"{a} made by {label}") for a, label in hlo.largest(module)]
    else:
        shards = mesh.shape["data"] * mesh.shape["fsdp"]
        rows = (program.rows, program.tokens)
        made = count.arrays(traced.jaxpr, shards, rows)[:5]
        sized += [(size, f"{shape} of all chips, made by {operation} (estimated)") for size, shape, operation in made]
    return tuple(f"{size / GIB:.2f} GiB {what}" for size, what in sorted(sized, key=lambda pair: -pair[0])[:5])


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{','.join(map(str, shape))}]"
