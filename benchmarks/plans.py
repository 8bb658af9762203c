"""Plans of every paper-size config, and weak scaling of one step: writes docs/plans.md.

    python -m benchmarks plans [--only=TEXT] [--known=runs/plans] [--out=docs/plans.md]

Needs libtpu (requirements-tpu.txt) and no TPU. A program takes the compiler half a minute to a few; what is compiled is
kept in `--known`, so that the same command continues, and `--only` takes the rows that contain a text. The document is
written from the rows that are there; those that are not are listed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
from pathlib import Path

from ml_collections import ConfigDict

from kd_jax.errors import ConfigError
from kd_jax.plan import plan
from kd_jax.plan.chips import Topology
from kd_jax.plan.compiled import GIB, Figures, versions
from kd_jax.plan.sketch import sketch

FSDP = "--config.mesh.data=1 --config.mesh.fsdp={} --config.mesh.tensor={}"
# (config, topology, options): the config's own mesh where its rows divide over the chips.
PLANS: list[tuple[str, str, str]] = [
    ("llama2_kd", "v5e:8x8", FSDP.format(32, 2)),
    ("llama2_kd", "v5p:4x4x4", FSDP.format(16, 4)),
    ("llama2_kd", "v6e:4x4", ""),
    ("llama2_kd", "v4:4x4x4", FSDP.format(16, 4)),
    *((f"gpt2_kd:{size}", "v5e:4x4", FSDP.format(16, 1)) for size in ("large", "medium", "base")),
    *((f"opt_kd:{size}", "v5e:4x4", FSDP.format(16, 1)) for size in ("1.3b", "350m", "125m")),
    ("llama2_kd:openllama", "v6e:4x4", ""),
    *((f"gpt2_kd:{size},zhang2025", "v5e:4x4", FSDP.format(16, 1)) for size in ("large", "medium", "base")),
    ("opt_kd:1.3b,zhang2025", "v6e:4x4", FSDP.format(16, 1)),  # a v5e is 1.2 GiB too small for MiniLLM's sampler
    *((f"opt_kd:{size},zhang2025", "v5e:4x4", FSDP.format(16, 1)) for size in ("350m", "125m")),
    ("llama2_kd:openllama,zhang2025", "v6e:4x4", ""),
]
SCALING = {"v5e:2x4": 8, "v5e:4x4": 16, "v5e:4x8": 32, "v5e:8x8": 64, "v5e:8x16": 128, "v5e:16x16": 256}
ROWS_PER_CHIP = 4


def config_of(name: str, options: str) -> ConfigDict:
    """A config file's config with options of the command line set."""
    module, _, variant = name.partition(":")
    config = importlib.import_module(f"configs.{module}").get_config(*([variant] if variant else []))
    for option in options.split():
        path, value = option.removeprefix("--config.").split("=")
        *parents, key = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[key] = type(node[key])(value)
    return config


class Known(dict):
    """Figures of compiled programs by digest, each in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        found = {p.stem: plan.figures_from_json(json.loads(p.read_text())) for p in folder.glob("program-*.json")}
        super().__init__({name.removeprefix("program-"): figures for name, figures in found.items()})

    def __setitem__(self, digest: str, figures: Figures) -> None:
        super().__setitem__(digest, figures)
        (self.folder / f"program-{digest}.json").write_text(json.dumps(dataclasses.asdict(figures)))


def row_file(folder: Path, name: str, topology: str, options: str) -> Path:
    words = "_".join([name, topology, *(o.split(".")[-1] for o in options.split())])
    return folder / f"plan-{words.replace(':', '-').replace('=', '').replace(',', '-')}.json"


def make_row(known: Known, name: str, topology: str, options: str) -> None:
    """Plan one row and keep it; a row that is there is left as it is."""
    path = row_file(known.folder, name, topology, options)
    if path.exists():
        return
    try:
        made = dataclasses.asdict(plan.make(config_of(name, options), Topology(topology), fix=False, known=known))
    except ConfigError as error:
        print(f"{name} on {topology}: {error}", flush=True)
        return
    path.write_text(json.dumps(made | {"versions": versions()}))
    print(f"{name} on {topology}: {read_row(path)[0].verdict}", flush=True)


def read_row(path: Path) -> tuple[plan.Plan, str]:
    found = json.loads(path.read_text())
    made_by = found.pop("versions")
    return plan.from_json(found), made_by


def scaling_row(known: Known, topology: str, chips: int) -> tuple[str, str, str]:
    """The kd step of llama2_kd with so many rows a chip, alone."""
    options = f"--config.recipes.kd.batch_rows={ROWS_PER_CHIP * chips} {FSDP.format(chips, 1)}"
    path = row_file(known.folder, "kd_step", topology, options)
    if not path.exists():
        config = config_of("llama2_kd", options)
        keep = ("base_teacher", "base_student", "students/kd")
        config.runs = ConfigDict({run: config.runs[run] for run in keep})
        config.runs["students/kd"].teacher = "base_teacher"
        made = plan.make(config, Topology(topology), fix=False, known=known, kinds=("train",))
        path.write_text(json.dumps(dataclasses.asdict(made) | {"versions": versions()}))
    return "kd_step", topology, options


# -------------------------------------------------------------------------------------------------------- document


def write(folder: Path, out: Path) -> None:
    """The document from the rows that are there."""
    there = []
    for name, topology, options in PLANS:
        if (path := row_file(folder, name, topology, options)).exists():
            made, by = read_row(path)  # the times are those of the present arithmetic, whenever it was compiled
            there.append(((name, topology, options), plan.timed(made, sketch(config_of(name, options))), by))
    made_by = sorted({v for _, _, v in there})
    lines = [
        "# Plans",
        "",
        f"Written by `python -m benchmarks plans`; compiled for TPUs without one, by {' and '.join(made_by)}.",
        "",
        "GiB are per chip and the most of all programs of a config: arguments, what is held besides them (the state of",
        "training while an evaluation runs), temporaries. Hours are of all runs one after another: the slower of the",
        "roofline and 40 % of the chips' peak in model FLOPs, for 15,011 records of 147 tokens on average (75 scored),",
        "Dolly's. They are estimates by arithmetic; no TPU has run these programs here.",
        "",
        "| config | topology | GiB | of | tightest program | step of | ms | bound | hours | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, topology, _), made, _ in there:
        lines.append(_row(name, topology, made))
    lines += ["", "The commands:", "", "```bash"]
    for (name, topology, options), _, _ in there:
        module, _, variant = name.partition(":")
        config = f"configs/{module}.py" + (f":{variant}" if variant else "")
        lines.append(f"python main.py --config={config} --stages=plan --topology={topology} {options}".rstrip())
    lines += ["```", *_notes(there), *_scaling(folder)]
    missing = [
        f"{name} on {topology}" for name, topology, o in PLANS if not row_file(folder, name, topology, o).exists()
    ]
    if missing:
        lines += ["", f"Not compiled yet (the same command continues): {'; '.join(missing)}."]
    out.write_text("\n".join(lines) + "\n")


def _row(name: str, topology: str, made: plan.Plan) -> str:
    chip = Topology(topology).chip
    compiled = [f for f in made.figures if not f.fault]
    largest = max(compiled, key=lambda f: f.peak)
    trained = [p for p in made.paces if p.steps]
    pace = next((p for p in trained if p.run == "students/kd"), trained[-1] if trained else None)
    step = ["-"] * 3 if pace is None else [pace.run, f"{pace.step_seconds * 1e3:.0f}", pace.bound]
    cells = [f"`{name}`", topology, f"{largest.peak / GIB:.2f}", f"{chip.hbm / GIB:.2f}", largest.kind, *step]
    return f"| {' | '.join([*cells, f'{made.hours:.1f}' if made.verdict == 'passes' else '-', made.verdict])} |"


def _notes(there: list) -> list[str]:
    notes = []
    for (name, topology, _), made, _ in there:
        notes += [f"* `{name}` on {topology}: {text}" for text in [*made.problems, *made.faults]]
    return ["", *notes] if notes else []


def _scaling(folder: Path) -> list[str]:
    lines = [
        "",
        "## Weak scaling",
        "",
        f"The kd step of `llama2_kd` on TPU v5e, {ROWS_PER_CHIP} rows of 512 tokens a chip, mesh fsdp = chips; by the",
        "compiler's own figures, per chip; a token is one of the chip's own. Bytes sent are those of rings.",
        "",
        "| chips | topology | arguments GiB | temporaries GiB | GB sent a step | bytes sent a token | GB by kind |",
        "|---|---|---|---|---|---|---|",
    ]
    for topology, chips in SCALING.items():
        options = f"--config.recipes.kd.batch_rows={ROWS_PER_CHIP * chips} {FSDP.format(chips, 1)}"
        path = row_file(folder, "kd_step", topology, options)
        if not path.exists():
            continue
        f = read_row(path)[0].figures[0]
        if f.fault:
            lines.append(f"| {chips} | {topology} | - | - | - | - | {f.fault[:120]} |")
            continue
        kinds = ", ".join(f"{kind} {t.bytes / 1e9:.2f}" for kind, t in f.collectives.items())
        cells = [f"{chips}", topology, f"{f.arguments / GIB:.2f}", f"{f.temporaries / GIB:.2f}", f"{f.sent / 1e9:.2f}"]
        lines.append(f"| {' | '.join([*cells, f'{f.sent / (f.tokens / chips):,.0f}', kinds])} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose config or topology contains this; `scaling`")
    parser.add_argument("--known", type=Path, default=Path("runs/plans"))
    parser.add_argument("--out", type=Path, default=Path("docs/plans.md"))
    arguments = parser.parse_args()
    known = Known(arguments.known)
    for name, topology, options in PLANS:
        if arguments.only in f"{name} {topology}":
            make_row(known, name, topology, options)
            write(known.folder, arguments.out)
    for topology, chips in SCALING.items():
        if arguments.only in f"scaling {topology}":
            scaling_row(known, topology, chips)
            write(known.folder, arguments.out)
    write(known.folder, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
