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
            "teacher": Row(5e-4, 20, 8),
            "student": Row(5e-4, 3, 8),  # no student without a teacher is published: its SFT start
            "kd": Row(1e-5, 10, 4, kd_ratio=0.5),
            "seqkd": Row(5e-4, 10, 8, kd_ratio=0.5),
            "gkd": Row(5e-4, 10, 8, lm=True, objective="zhang_gkd"),
            "imitkd": Row(5e-4, 10, 8, lm=True),
            "distillm": Row(5e-4, 10, 8, lm=True),
            "minillm": Row(5e-6, 10, 8, lm=True, accumulation=4),
        }
    batch = {"large": 4, "medium": 8, "base": 16, "1.3b": 4, "350m": 8, "125m": 16}[size]
    sft = {"teacher": Row(5e-5, 5, 4), "student": Row(5e-5, 5, 4)}
    if family == "opt":
        rows = {name: Row(5e-5, 10, batch, lm=True) for name in TECHNIQUES}
        rows["gkd"] = dataclasses.replace(rows["gkd"], objective="zhang_gkd")
        return sft | rows | {"minillm": Row(5e-6, 10, 4, lm=True)}
    return sft | {
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
            "teacher": Row(5e-4, 20, 4),
            "student": Row(5e-4, 3, 8),
            "init": Row(5e-4, 3, 8),
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
            "teacher": Row(5e-5, 10, 4),
            "student": Row(5e-4 if size == "125m" else 5e-5, common["epochs"], 32, accumulation=4),
            "init": Row(5e-5, 3, 8),
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
        "teacher": Row(5e-5, 10, 2),
        "student": Row(5e-4 if small else 1e-4, epochs, 8),
        "init": Row(5e-4, 3, 8),
        "kd": Row(5e-4, epochs, data_batch),
        "seqkd": Row(5e-4, epochs, data_batch, lm=small),
        "gkd": Row(5e-4, epochs, data_batch, init=True, objective="zhang_gkd"),
        "imitkd": Row(5e-4, epochs, last_batch, lm=True, init=True),
        "distillm": dataclasses.replace(skewed, objective="distillm_sfkl" if small else ""),
        "minillm": Row(5e-6, epochs, 8 if small else 4, lm=True, init=True, accumulation=1 if small else 2),
    }


def _minillm(family: str, size: str) -> dict[str, Row]:
    if family == "opt" and size == "1.3b":
        teacher, sft = Row(1e-5, 10, 8), Row(5e-5, 10, 8)
        policy = Row(5e-6, 10, 16, lm=True, init=True)
    elif family == "llama":
        teacher = sft = Row(1e-5, 10, 8)
        policy = Row(5e-6, 10, 16, lm=True, init=True, accumulation=2)
    elif family == "gpt2":
        lr, epochs = (5e-4, 20) if size == "base" else (1e-4, 20 if size == "medium" else 10)
        teacher, sft = Row(5e-5, 10, 2), Row(lr, epochs, 2)
        policy = Row(5e-6, 10, 16 if size == "base" else 4, lm=True, init=True, accumulation=1 if size == "base" else 2)
    else:
        raise ValueError(f"MiniLLM's code has no recipe for {family} {size}")
    data = dataclasses.replace(sft, kd_ratio=0.5)
    return {"teacher": teacher, "student": sft, "init": sft, "kd": data, "seqkd": data, "minillm": policy}


PAPERS = {"zhang2025": _zhang, "distillm": _distillm, "minillm": _minillm}


def apply(config: ConfigDict, paper: str, family: str, size: str, gpus: int) -> None:
    """Give `config` a paper's runs: a recipe for teacher, SFT student and start, a recipe and objective per technique.

    Raises ValueError for a paper, family or size that has no published recipe.
    """
    if paper not in PAPERS:
        raise ValueError(f"no published recipe is called {paper!r}; known are {', '.join(PAPERS)}")
    rows = PAPERS[paper](family, size)
    adapters = dict(lora_rank=16, lora_alpha=64.0, lora_dropout=0.1) if family == "llama" and paper != "minillm" else {}
    # zhang2025 keeps the last checkpoint; the other two the start of least dev loss and the student of best ROUGE-L.
    kept = "last" if paper == "zhang2025" else "best_dev_rouge"
    config.probe.rouge_examples = 0 if kept == "last" else 1000
    config.recipes, config.objectives = ConfigDict(), ConfigDict({"sft": base.objective("sft")})
    for name, row in rows.items():
        recipe = dict(lr=row.lr, epochs=row.epochs, batch_rows=row.batch * gpus, accumulation=row.accumulation)
        recipe |= dict(lr_min=1e-7, compute_dtype="bfloat16", remat=True, checkpoints=10, evaluations=row.epochs)
        recipe |= dict(select="best_dev_loss" if name == "init" and kept != "last" else kept, **adapters)
        if name == "minillm":
            schedule = "cosine" if family == "llama" else "constant"
            recipe |= dict(b2=0.95, weight_decay=1e-6, warmup_steps=100, schedule=schedule)
            recipe |= dict(lora_dropout=0.0) if adapters else {}
            if paper == "zhang2025":  # ten sets of 256 rollouts, four passes each
                recipe["steps"] = 10 * 4 * 256 // (row.batch * gpus)
        config.recipes[name] = base.recipe(paper, **recipe)
    techniques = tuple(name for name in rows if name in TECHNIQUES)
    for name in techniques:
        row = rows[name]
        changes = dict(kd_ratio=row.kd_ratio, lm_coef=float(row.lm), max_new_tokens=256)
        if family == "llama" and name == "distillm":
            changes |= dict(phi=0.2, phi_eps=0.2)
        config.objectives[name] = base.objective(row.objective or name, **changes)
    init = "init" if "init" in rows else ""
    config.runs = base.standard_runs("teacher", "student", "", techniques=techniques, shared=("kd",), init=init)
    for name, entry in config.runs.items():
        if entry.teacher:
            entry.recipe = entry.technique
            entry.init = "init_student" if rows[entry.technique].init else "base_student"
        elif name in ("null", "direct"):
            entry.init = "base_student"
