"""The plan of a config on named machines: `run` prints it, and refuses what does not fit.

    python main.py --config=configs/X.py --stages=plan [--topology=v5e:8x8 --topology=v5p:4x4x4 ...]

For a TPU topology the config's own programs are compiled by the TPU's compiler (libtpu, no TPU needed). For `gpu:N`
they are compiled for N virtual devices by XLA's CPU compiler, in a process of its own where this one has fewer: there
memory and collectives are estimates, and high ones, for that compiler computes bfloat16 in float32. Without a topology
they are compiled for the host's devices; a CPU has no limit and no rates in the table. Weights and data are not read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from kd_jax import foreign, sharding, storage
from kd_jax.errors import ConfigError
from kd_jax.plan import disk, hlo, hours, remedies
from kd_jax.plan.chips import Topology
from kd_jax.plan.compiled import GIB, Figures, compile_chain, versions
from kd_jax.plan.programs import all_programs
from kd_jax.plan.sketch import Sketch, check_rows, sketch
from kd_jax.transformer import ModelConfig


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on one topology."""

    topology: str
    mesh: dict[str, int]
    figures: list[Figures]
    paces: list[hours.Pace]
    problems: list[str]  # why it is refused
    faults: list[str]  # what the compiler could not do

    @property
    def hours(self) -> float:
        return sum(pace.hours for pace in self.paces)

    @property
    def verdict(self) -> str:
        """Passes | does not fit | not compiled."""
        return "does not fit" if self.problems else "not compiled" if self.faults else "passes"


def run(config: ConfigDict, workdir: str, topologies: Iterable[str] = ()) -> None:
    """Print the plan for every topology (the host's devices where none is named), and what the config stores.

    Raises ConfigError, after all is printed, where a program does not fit the chips or the files the disk.
    """
    config = foreign.complete(config)
    found = sketch(config)
    needed, available = disk.needs(found), storage.free_bytes(storage.as_path(workdir))
    wanted = [Topology(name) for name in topologies or ("host",)]
    print(header(found))
    plans, problems = [], []
    for topology in wanted:
        try:
            plans.append(make(config, topology))
        except ConfigError as error:
            print(f"\n{topology.name}: {error}")
            problems.append(f"{topology.name}: {error}")
            continue
        print("\n" + table(plans[-1], found), flush=True)
        problems += [f"{topology.name}: {problem}" for problem in plans[-1].problems]
    if len(plans) > 1:
        print("\n" + comparison(plans))
    print("\n" + stored(needed, available, workdir))
    if problems:
        raise ConfigError("the plan is refused:\n" + "\n".join(problems))
    disk.check(needed, available, workdir)


def make(
    config: ConfigDict,
    topology: Topology,
    fix: bool = True,
    known: dict[str, Figures] | None = None,
    kinds: tuple[str, ...] = (),
) -> Plan:
    """Compile every program of the config for a topology. Raises ConfigError where that cannot even be begun.

    fix: where a program does not fit, look for a change under which it would. known: see `compile_chain`.
    kinds: of programs (train, score, prepare, prefill, decode) that are compiled; none named: all.
    """
    if topology.estimated and (topology.chips > jax.device_count() or jax.default_backend() != "cpu"):
        return _elsewhere(config, topology, fix, kinds)
    found, devices = sketch(config), topology.devices()
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    check_rows(found, mesh)
    chip = topology.chip
    figures = []
    for chain in all_programs(found, mesh, topology.platform):
        if kinds and chain[0].kind not in kinds:
            continue
        figures += compile_chain(chain, mesh, topology, known)
    large = [f for f in figures if chip and not f.fault and f.peak > chip.hbm]
    problems = [refusal(f, topology, remedies.find(config, f, devices, topology) if fix else "") for f in large]
    said = f"the compiler failed on it ({versions()}), which is no fault of the config"
    faults = [f"{f.label}: {said}: {f.fault}" for f in figures if f.fault]
    if topology.platform != jax.default_backend():
        jax.clear_caches()  # what was traced here believes in another platform
    return timed(Plan(topology.name, dict(mesh.shape), figures, [], problems, faults), found)


def timed(plan: Plan, found: Sketch) -> Plan:
    """A plan with the times of its runs, from its figures."""
    topology = Topology(plan.topology)
    if (chip := topology.chip) is None:
        return plan
    fitting = [f for f in plan.figures if f.fault or f.peak <= chip.hbm]
    return dataclasses.replace(plan, paces=hours.paces(found, fitting, chip, topology.chips))


# ---------------------------------------------------------------------------------------------- in another process


def _elsewhere(config: ConfigDict, topology: Topology, fix: bool, kinds: tuple[str, ...]) -> Plan:
    """A plan for virtual devices from a process that has them: this one has fewer, or accelerators of its own."""
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={topology.chips}"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    plain = json.loads(config.to_json_best_effort())
    asked = {"config": plain, "topology": topology.name, "fix": fix, "kinds": kinds}
    command = [sys.executable, "-m", "kd_jax.plan.plan"]
    done = subprocess.run(command, input=json.dumps(asked), env=environment, capture_output=True, text=True)
    answer = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 and done.stdout else {}
    if "plan" not in answer:
        raise ConfigError(answer.get("error") or f"planning for {topology.name} failed:\n{done.stderr[-2000:]}")
    return from_json(answer["plan"])


def from_json(plan: dict) -> Plan:
    """The Plan of `dataclasses.asdict`, after JSON."""
    figures = [figures_from_json(f) for f in plan["figures"]]
    return Plan(**plan | {"figures": figures, "paces": [hours.Pace(**pace) for pace in plan["paces"]]})


def figures_from_json(f: dict) -> Figures:
    """The Figures of `dataclasses.asdict`, after JSON."""
    traffic = {kind: hlo.Traffic(**t) for kind, t in f["collectives"].items()}
    return Figures(**f | {"collectives": traffic, "runs": tuple(f["runs"]), "largest": tuple(f["largest"])})


def _answer() -> None:
    asked = json.load(sys.stdin)
    try:
        config, topology = ConfigDict(asked["config"]), Topology(asked["topology"])
        plan = make(config, topology, asked["fix"], kinds=tuple(asked["kinds"]))
        print(json.dumps({"plan": dataclasses.asdict(plan)}))
    except ConfigError as error:
        print(json.dumps({"error": str(error)}))


# ---------------------------------------------------------------------------------------------------------- tables


def header(found: Sketch) -> str:
    """What the plan starts from, and where each fact is from."""
    lines = [f"models.{name}: {_size(shape.cfg)}, shape from {shape.source}" for name, shape in found.shapes.items()]
    plan = found.stated
    lines.append(f"{found.records:,} records ({found.records_from}); vocabulary {found.vocab:,}")
    lines.append(
        f"stated by config.plan: {plan.record_tokens} tokens a record, {plan.scored_tokens} of them scored, "
        f"{plan.mfu:.0%} of the chips' peak"
    )
    return "\n".join([f"Plan ({versions()})", *lines])


def _size(cfg: ModelConfig) -> str:
    return f"{cfg.layers} layers of width {cfg.width}, {cfg.vocab_size:,} vocabulary rows"


def table(plan: Plan, found: Sketch) -> str:
    """One topology: memory, work and time of every program per chip, then of every run."""
    topology = Topology(plan.topology)
    chip = topology.chip
    mesh = " x ".join(f"{k} {v}" for k, v in plan.mesh.items())
    what = f"{chip.name}, {chip.hbm / GIB:.2f} GiB for programs" if chip else "no chip of the table: no times"
    lines = [f"{plan.topology}: {topology.chips} devices ({what}), mesh {mesh}"]
    if topology.estimated:
        named = "an H100 is assumed; " if topology.kind == "gpu" else ""
        lines.append(f"ESTIMATE: {named}compiled for {topology.chips} virtual CPU devices, not by a GPU's compiler")
    rows = []
    for f in plan.figures:
        cells = [f.label, f"{f.arguments / GIB:.2f}", f"{f.resident / GIB:.2f}", f"{f.temporaries / GIB:.2f}"]
        cells += [f"{f.peak / GIB:.2f}", f"{f.flop / 1e12:.3g}", f"{f.moved / 1e9:.3g}", f"{f.sent / 1e9:.3g}"]
        if f.fault:
            cells += ["-", "compiler failed"]
        elif chip:
            bound, seconds = f.bound(chip)
            cells += [f"{seconds * 1e3:.3g}", bound if f.peak <= chip.hbm else "DOES NOT FIT"]
        rows.append(cells)
    names = ["per chip", "arguments GiB", "held GiB", "temporaries GiB", "peak GiB", "TFLOP", "HBM GB", "sent GB"]
    lines += ["", *_columns([names + (["ms", "bound"] if chip else []), *rows])]
    lines += [f"{f.label} sends: {_traffic(f)}" for f in plan.figures if f.collectives]
    if plan.paces:
        runs = [["run", "steps", "ms a step", "bound", "tokens/s", "hours"]]
        for p in plan.paces:
            pace = [f"{p.steps:,}", f"{p.step_seconds * 1e3:.3g}", p.bound, f"{p.tokens_per_second:,.0f}"]
            runs.append([p.run, *(pace if p.steps else "----"), f"{p.hours:.2f}"])
        lines += ["", *_columns(runs), f"all runs, one after another: {plan.hours:.1f} hours"]
    return "\n".join(lines + [*plan.faults, *(f"REFUSED: {problem}" for problem in plan.problems)])


def _traffic(f: Figures) -> str:
    return ", ".join(f"{kind} {t.bytes / 1e9:.3g} GB in {t.count:,}" for kind, t in f.collectives.items())


def comparison(plans: list[Plan]) -> str:
    """Topologies side by side: the most that a chip holds, and the hours of all runs."""
    rows = [["topology", "chips", "mesh", "peak GiB", "of GiB", "hours", "chip hours", "verdict"]]
    for plan in plans:
        topology = Topology(plan.topology)
        peak = max((f.peak for f in plan.figures if not f.fault), default=0.0)
        usable = f"{topology.chip.hbm / GIB:.2f}" if topology.chip else "-"
        whole = plan.verdict == "passes" and topology.chip
        cost = [f"{plan.hours:.1f}", f"{plan.hours * topology.chips:.0f}"] if whole else ["-", "-"]
        mesh = "x".join(map(str, plan.mesh.values()))
        rows.append([plan.topology, f"{topology.chips}", mesh, f"{peak / GIB:.2f}", usable, *cost, plan.verdict])
    return "\n".join(_columns(rows))


def stored(needed: dict[str, float], available: int | None, workdir: str) -> str:
    """What the config writes at most, against the disk."""
    parts = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needed.items() if size)
    room = "a bucket: nothing to measure" if available is None else f"{available / 1e9:.1f} GB free"
    return f"Files, at most: {parts}; together {sum(needed.values()) / 1e9:.1f} GB in {workdir} ({room})"


def refusal(f: Figures, topology: Topology, remedy: str) -> str:
    """Which program does not fit, by how much, what is large in it, what would help."""
    over = f.peak - topology.chip.hbm
    by = "more than can be said" if over == float("inf") else f"{over / GIB:.2f} GiB ({over:,.0f} bytes)"
    largest = "; ".join(f.largest[:3])
    return (
        f"{f.label} needs {f.peak / GIB:.2f} GiB per chip of {topology.chip.hbm / GIB:.2f}, {by} too much. "
        f"Largest per chip: {largest}." + (f" What would fix it: {remedy}." if remedy else "")
    )


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    place: Callable[[int, str], str] = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
    return ["  ".join(place(i, cell) for i, cell in enumerate(row)).rstrip() for row in rows]


if __name__ == "__main__":
    _answer()
