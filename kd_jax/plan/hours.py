"""How long a config takes, from the figures of its programs: the roofline, and a stated share of the chips' peak."""

from __future__ import annotations

import dataclasses
import math

from kd_jax.graph import Run
from kd_jax.plan import count
from kd_jax.plan.chips import Chip
from kd_jax.plan.compiled import Figures
from kd_jax.plan.sketch import Sketch


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of one step of a run, and what the whole run takes."""

    run: str
    steps: int  # of all seeds and learning rates
    step_seconds: float
    bound: str  # compute | memory | network, by the roofline; or mfu, where the stated share is slower
    tokens_per_second: float  # of the training batches, padding included
    hours: float  # training, sampling, evaluations and scoring


def step_flops(sketch: Sketch, run: Run) -> float:
    """What the model of one training step needs, without recomputation, over all chips."""
    recipe, objective, data = sketch.recipe(run), sketch.objective(run), sketch.config.data
    teacher = sketch.shapes[sketch.runs[run.teacher].model].cfg if sketch.compares(run) else None
    rows = recipe.batch_rows
    tokens, scored = float(rows * sketch.row_length), float(sketch.scored(rows, data.pack))
    common = dict(time=sketch.row_length, vocab=sketch.vocab, trained=0.0 if recipe.lora_rank else 1.0)
    student, cached = sketch.shapes[run.model].cfg, recipe.cache != "none" and not objective.on_policy
    found = count.model_flops(student, None if cached else teacher, tokens=tokens, scored=scored, **common)
    if objective.lm_coef:
        lm_teacher = teacher if objective.lm_kd_ratio else None
        found += count.model_flops(student, lm_teacher, tokens=tokens, scored=tokens, **common)
    return found


def paces(sketch: Sketch, figures: list[Figures], chip: Chip, chips: int) -> list[Pace]:
    """Of every trained run whose programs were compiled."""
    mfu = sketch.stated.mfu
    by_run = {(f.kind, name): f for f in figures if not f.fault for name in f.runs}
    out = []
    for run in sketch.runs.values():
        figure = by_run.get(("train", run.name))
        if figure is None:
            continue
        bound, seconds = figure.bound(chip)
        at_share = (
            step_flops(sketch, run) / (chips * chip.peak * mfu) * (1 if figure.products == 1 else figure.products)
        )
        if at_share > seconds:
            bound, seconds = "mfu", at_share
        recipe = sketch.recipe(run)
        times = len(run.seeds) + (len(recipe.rates) - 1 if not run.swap_of else 0)
        steps = sketch.steps(run) * times
        total = steps * (seconds + _sampling_seconds(sketch, run, by_run, chip))
        total += len(run.seeds) * _text_seconds(sketch, run, by_run, chip)
        if score := by_run.get(("score", run.name)):
            total += _scoring_seconds(sketch, run, score, chip, times)
        rate = recipe.batch_rows * sketch.row_length / seconds
        out.append(Pace(run.name, steps, seconds, bound, rate, total / 3600))
    return out


def _scoring_seconds(sketch: Sketch, run: Run, score: Figures, chip: Chip, times: int) -> float:
    """The tables of every seed, and the evaluations during training."""
    shares, config = sketch.config.data.roles, sketch.config
    records = math.ceil(sum(shares.get(role, 0.0) for role in config.score.roles) * sketch.records)
    batches = lambda examples: -(-sketch.scored_rows(examples) // score.rows)
    probes = (sketch.recipe(run).evaluations + 1) * 3 * batches(config.probe.examples) * times
    return (batches(records) * len(run.seeds) + probes) * score.bound(chip)[1]


def _batch_seconds(by_run: dict, run: Run, new: int, chip: Chip) -> tuple[float, int]:
    """One batch of prompts continued by `new` tokens each, none ending early: seconds, and its rows."""
    prefill, decode = by_run.get(("prefill", run.name)), by_run.get(("decode", run.name))
    if prefill is None or decode is None:
        return 0.0, 1
    return prefill.bound(chip)[1] + new * decode.bound(chip)[1] / decode.chunks, prefill.rows


def _sampling_seconds(sketch: Sketch, run: Run, by_run: dict, chip: Chip) -> float:
    """Of one step's samples, on average: as many steps sample as the policy lets at most."""
    o = sketch.objective(run)
    if not o.on_policy:
        return 0.0
    new = o.sampling(sketch.config.data.max_length).max_new_tokens
    seconds, rows = _batch_seconds(by_run, run, new, chip)
    prompts = sketch.recipe(run).batch_rows
    share = {"mix": o.lmbda, "mix_replay": o.lmbda, "adaptive": 1.0, "mixed_rollouts": 1.0 / o.passes}[o.policy]
    batches = prompts / rows if o.policy_gradient else -(-prompts // rows)
    return share * batches * seconds


def _text_seconds(sketch: Sketch, run: Run, by_run: dict, chip: Chip) -> float:
    """Of teacher text for all records of a run (shared with other runs, counted with each)."""
    o = sketch.objective(run)
    if o.policy != "teacher":
        return 0.0
    seconds, rows = _batch_seconds(by_run, run, o.sampling(sketch.config.data.max_length).max_new_tokens, chip)
    return -(-sketch.examples(run.train_roles) // rows) * seconds
