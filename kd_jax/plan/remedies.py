"""What would make a program fit: cheap changes first, each tried by compiling the program once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from kd_jax import sharding
from kd_jax.errors import ConfigError
from kd_jax.plan.chips import Topology
from kd_jax.plan.compiled import Figures, compile_chain
from kd_jax.plan.programs import Program, all_programs, chip_bytes
from kd_jax.plan.sketch import check_rows, sketch

MOST = 4  # programs compiled in search of a change; those whose arguments alone are too large are not compiled


def find(config: ConfigDict, failed: Figures, devices: list[jax.Device], topology: Topology) -> str:
    """The first change under which the failed program fits, as an option of the command line, or what was tried."""
    tried = []
    for option, change in _changes(config, failed, topology.chips):
        changed = config.copy_and_resolve_references()
        try:
            change(changed)
            program_chain, mesh = _same(changed, failed, devices, topology)
        except ConfigError:  # a mesh that the rows or the wiring do not allow
            continue
        room = topology.chip.hbm
        first = program_chain[0]
        if chip_bytes(first.arguments) + chip_bytes(first.resident) > room:
            continue
        tried.append(option)
        figures = compile_chain(program_chain, mesh, topology)
        if all(not f.fault and f.peak <= room for f in figures) and any(f.kind == failed.kind for f in figures):
            return f"it fits with {option}"
        if len(tried) == MOST:
            break
    size = "more chips, chips with more memory, or a smaller model"
    return f"it does not fit with {' or '.join(tried)} either: take {size}" if tried else f"it takes {size}"


def _same(
    config: ConfigDict, failed: Figures, devices: list[jax.Device], topology: Topology
) -> tuple[list[Program], jax.sharding.Mesh]:
    found = sketch(config)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    check_rows(found, mesh)
    for chain in all_programs(found, mesh, topology.platform):
        if any(p.kind == failed.kind and set(p.runs) & set(failed.runs[:1]) for p in chain):
            return chain, mesh
    raise ConfigError(f"{failed.label}: no such program")


def _changes(config: ConfigDict, failed: Figures, chips: int) -> Iterator[tuple[str, Callable[[ConfigDict], None]]]:
    """(option, change) in the order of what they cost."""
    recipes = sorted({config.runs[name].recipe for name in failed.runs if config.runs[name].recipe})
    trained = failed.kind == "train"

    def every(key: str, value) -> tuple[str, Callable[[ConfigDict], None]]:
        def change(changed):
            for name in recipes:
                changed.recipes[name][key] = value

        return " ".join(f"--config.recipes.{name}.{key}={value}" for name in recipes), change

    if trained and not all(config.recipes[name].remat for name in recipes):
        yield every("remat", True)
    if trained:
        factors = [f for f in (2, 4, 8) if all(config.recipes[n].batch_rows % f == 0 for n in recipes)]
        for factor in factors:
            yield every("accumulation", factor * max(config.recipes[name].accumulation for name in recipes))
    if trained:
        yield every("chunk", 256)
        if any(config.recipes[name].compute_dtype == "float32" for name in recipes):
            yield every("compute_dtype", "bfloat16")
    if failed.kind == "score" and config.score.batch_rows > 1:
        yield "--config.score.batch_rows=1", lambda changed: changed.score.update(batch_rows=1)
    for fsdp, tensor in ((chips, 1), (chips // 2, 2), (chips // 4, 4), (chips // 8, 8), (1, chips)):
        if fsdp >= 1 and fsdp * tensor == chips:
            option = f"--config.mesh.data=1 --config.mesh.fsdp={fsdp} --config.mesh.tensor={tensor}"
            yield option, lambda c, f=fsdp, t=tensor: c.mesh.update(data=1, fsdp=f, tensor=t)
