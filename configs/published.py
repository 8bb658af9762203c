"""Published recipes of the six techniques, per family and student size, as the papers' scripts have them.

`apply(config, paper, family, size, gpus)` replaces a config's recipes, objectives and students by a paper's. Papers:
zhang2025 (ziqi-zhang/LLM_Distillation_Privacy), distillm (jongwooko/distillm) and minillm (microsoft/LMOps). Their
batches are per GPU, and no script records how many GPUs: the global batch is theirs times `gpus`. Learning rate, start,
plain-text term and epochs differ between techniques there: such a table ranks recipes, `matched` ranks techniques.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import base
from kd_jax.distill.objective import TECHNIQUES


@dataclasses.dataclass(frozen=True)
class Row:
    """One technique's line in a table."""

    lr: float
    epochs: int
    batch: int  # per GPU and optimiser step
    lm: bool = False  # plain-text term (OpenWebText; RoBERTa's corpus in MiniLLM's OPT and LLaMA)
    kd_ratio: float = 1.0
    init: bool = False  # from an SFT on the public role instead of the pre-trained checkpoint
    objective: str = ""  # preset, where it is not the technique's name
    accumulation: int = 1


def _zhang(family: str, size: str) -> dict[str, Row]:
    if family == "llama":
        return {
            "kd": Row(1e-5, 10, 4, kd_ratio=0.5),
            "seqkd": Row(5e-4, 10, 8, kd_ratio=0.5),
            "gkd": Row(5e-4, 10, 8, lm=True, objective="zhang_gkd"),
            "imitkd": Row(5e-4, 10, 8, lm=True),
            "distillm": Row(5e-4, 10, 8, lm=True),
            "minillm": Row(5e-6, 10, 8, lm=True, accumulation=4),
        }
    batch = {"large": 4, "medium": 8, "base": 16, "1.3b": 4, "350m": 8, "125m": 16}[size]
    if family == "opt":
        rows = {name: Row(5e-5, 10, batch, lm=True) for name in TECHNIQUES}
        rows["gkd"] = dataclasses.replace(rows["gkd"], objective="zhang_gkd")
        return rows | {"minillm": Row(5e-6, 10, 4, lm=True)}
    return {
        "kd": Row(5e-5, 10, batch),
        "seqkd": Row(5e-4, 10, batch),
        "gkd": Row(5e-4, 10, 8, objective="zhang_gkd"),
        "imitkd": Row(5e-4, 10, 4, lm=True),
        "distillm": Row(1e-4, 10, 4, lm=True),
        "minillm": Row(5e-6, 10, batch, lm=True),
    }


def _distillm(family: str, size: str) -> dict[str, Row]:
    if family == "llama":
        common = dict(lr=5e-4, epochs=10, batch=8, lm=True, init=True)
        return {
            "kd": Row(1e-5, 10, 4, kd_ratio=0.5),
            "seqkd": Row(5e-4, 10, 8, kd_ratio=0.5),
            "gkd": Row(**common, objective="zhang_gkd"),
            "imitkd": Row(**common),
            "distillm": Row(**common),
            "minillm": Row(5e-6, 10, 8, lm=True, init=True, accumulation=4),
        }
    if family == "opt":
        common = dict(lr=5e-5, epochs=10 if size == "1.3b" else 20, batch=8, lm=True)
        return {
            "kd": Row(**common),
            "seqkd": Row(**common),
            "gkd": Row(**common, objective="zhang_gkd"),
            "imitkd": Row(**common),
            "distillm": Row(**common, init=True),
            "minillm": Row(5e-6, common["epochs"], 8, lm=True, init=True),
        }
    epochs, small = (10 if size == "large" else 20), size == "base"
    data_batch, last_batch = (2 if small else 8), (4 if size == "large" else 8)
    skewed = Row(1e-4 if size == "large" else 5e-4, epochs, last_batch, lm=True, init=True)
    return {
        "kd": Row(5e-4, epochs, data_batch),
        "seqkd": Row(5e-4, epochs, data_batch, lm=small),
        "gkd": Row(5e-4, epochs, data_batch, init=True, objective="zhang_gkd"),
        "imitkd": Row(5e-4, epochs, last_batch, lm=True, init=True),
        "distillm": dataclasses.replace(skewed, objective="distillm_sfkl" if small else ""),
        "minillm": Row(5e-6, epochs, 8 if small else 4, lm=True, init=True, accumulation=1 if small else 2),
    }


def _minillm(family: str, size: str) -> dict[str, Row]:
    if family == "opt" and size == "1.3b":
        data, policy = Row(5e-5, 10, 8, kd_ratio=0.5), Row(5e-6, 10, 16, lm=True, init=True)
    elif family == "llama":
        data, policy = Row(1e-5, 10, 8, kd_ratio=0.5), Row(5e-6, 10, 16, lm=True, init=True, accumulation=2)
    elif family == "gpt2":
        lr, epochs = (5e-4, 20) if size == "base" else (1e-4, 20 if size == "medium" else 10)
        data = Row(lr, epochs, 2, kd_ratio=0.5)
        policy = Row(5e-6, 10, 16 if size == "base" else 4, lm=True, init=True, accumulation=1 if size == "base" else 2)
    else:
        raise ValueError(f"MiniLLM's code has no recipe for {family} {size}")
    return {"kd": data, "seqkd": data, "minillm": policy}


PAPERS = {"zhang2025": _zhang, "distillm": _distillm, "minillm": _minillm}
INIT = {"gpt2": 5e-4, "opt": 5e-5, "llama": 5e-4}  # learning rate of the 3-epoch SFT, by DistiLLM's scripts


def apply(config: ConfigDict, paper: str, family: str, size: str, gpus: int) -> None:
    """Give `config` a paper's techniques: one recipe and one objective each. `config.recipes` has teacher and student.

    Raises ValueError for a paper, family or size that has no published recipe.
    """
    if paper not in PAPERS:
        raise ValueError(f"no published recipe is called {paper!r}; known are {', '.join(PAPERS)}")
    rows = PAPERS[paper](family, size)
    common = dict(lr_min=1e-7, compute_dtype="bfloat16", remat=True, checkpoints=10)
    adapters = dict(lora_rank=16, lora_alpha=64.0, lora_dropout=0.1) if family == "llama" and paper != "minillm" else {}
    config.objectives = ConfigDict({"sft": base.objective("sft")})
    starts_from_sft = any(row.init for row in rows.values())
    if starts_from_sft:
        batch = next(iter(rows.values())).batch * gpus
        sft = base.recipe(
            paper, lr=INIT[family], epochs=3, batch_rows=batch, select="best_dev_loss", **common, **adapters
        )
        config.recipes.init = sft
    for name, row in rows.items():
        recipe = dict(
            lr=row.lr, epochs=row.epochs, batch_rows=row.batch * gpus, accumulation=row.accumulation, **common
        )
        if name == "minillm":
            schedule = "cosine" if family == "llama" else "constant"
            recipe |= dict(b2=0.95, weight_decay=1e-6, warmup_steps=100, schedule=schedule)
            if paper == "zhang2025":  # ten sets of 256 rollouts, four passes each
                recipe["steps"] = 10 * 4 * 256 // (row.batch * gpus)
        config.recipes[name] = base.recipe(paper, evaluations=row.epochs, **(adapters | recipe))
        changes = dict(kd_ratio=row.kd_ratio, lm_coef=float(row.lm), max_new_tokens=256)
        if family == "llama" and name == "distillm":
            changes |= dict(phi=0.2, phi_eps=0.2)
        config.objectives[name] = base.objective(row.objective or name, **changes)
    config.runs = base.standard_runs(
        "teacher", "student", "", techniques=tuple(rows), shared=("kd",), init="init" if starts_from_sft else ""
    )
    for name, entry in config.runs.items():
        if entry.teacher:
            entry.recipe = entry.technique
            entry.init = "init_student" if rows[entry.technique].init else "base_student"
        elif name in ("null", "direct"):
            entry.init = "base_student"
