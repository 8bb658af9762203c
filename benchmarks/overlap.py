"""Leak against overlap: how the student's leak grows as public prompts touch people of the private records.

    python -m benchmarks.overlap [--values 0 0.5 1] [--seeds 0 1] [--out docs/overlap]

Trains and audits the quickstart's teacher, student and null once per value and seed (finished work is skipped), and
draws the AUC of the loss attack with 95 % DeLong intervals.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

MODELS = {"teacher": "teacher", "students/kd": "student (distilled)", "null": "null (no teacher)"}


def run(value: float, seed: int, runs: Path) -> Path:
    """The quickstart's three runs of the figure, audited; returns the report directory."""
    workdir = runs / f"overlap{value:g}_seed{seed}"
    command = [sys.executable, "main.py", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    command += [f"--config.data.synthetic.overlap={value}", f"--config.seed={seed}"]
    for model in MODELS:
        subprocess.run([*command, "--stages=train,score", f"--only={model}"], check=True)
    subprocess.run([*command, "--stages=attack"], check=True)
    return workdir / "report"


def collect(values: list[float], seeds: list[int], runs: Path) -> pd.DataFrame:
    rows = []
    for value in values:
        for seed in seeds:
            table = pd.read_csv(run(value, seed, runs) / "membership.csv", keep_default_na=False, na_values=[""])
            keep = (table.attack == "loss") & (table.metric == "auc") & (table.task == "all")
            keep &= (table.role_pair == "private-heldout") & table.model.isin(MODELS)
            rows.append(table[keep].assign(overlap=value, split_seed=seed))
    columns = ["overlap", "split_seed", "model", "value", "ci_low", "ci_high", "n_members", "n_nonmembers"]
    return pd.concat(rows)[columns].sort_values(["model", "overlap", "split_seed"]).reset_index(drop=True)


def draw(table: pd.DataFrame, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for color, (model, label) in zip(("#0072B2", "#D55E00", "#666666"), MODELS.items()):
        rows = table[table.model == model]
        spread = (rows.split_seed - rows.split_seed.mean()) * 0.012  # seeds side by side
        error = [rows.value - rows.ci_low, rows.ci_high - rows.value]
        axes.errorbar(rows.overlap + spread, rows.value, error, fmt="o", ms=4, capsize=2, color=color, label=label)
        mean = rows.groupby("overlap").value.mean()
        axes.plot(mean.index, mean, color=color, lw=1.2)
    axes.axhline(0.5, color="black", lw=0.8, ls=":")
    axes.set_xlabel("overlap: share of public prompts about a person of another record")
    axes.set_ylabel("AUC of the loss attack, 95 % interval")
    first = table.iloc[0]
    counts = (
        f"{first.n_members:,.0f} members, {first.n_nonmembers:,.0f} non-members, {table.split_seed.nunique()} seed(s)"
    )
    axes.set_title(f"Invented records, tiny models, setting: disjoint\n{counts}", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--values", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("docs/overlap"))
    args = parser.parse_args()
    table = collect(args.values, args.seeds, args.runs)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(args.out.with_suffix(".csv"), index=False, float_format="%.4f")
    draw(table, args.out.with_suffix(".png"))
    print(table.to_string(index=False, float_format="%.3f"))


if __name__ == "__main__":
    main()
