"""How long a config takes, from the figures of its programs: the roofline, and a stated share of the chips' peak."""

from __future__ import annotations

import dataclasses

from kd_jax.graph import Run
from kd_jax.plan import count
from kd_jax.plan.chips import Chip
from kd_jax.plan.compiled import Figures
from kd_jax.plan.programs import SHARD
from kd_jax.plan.sketch import Sketch


@dataclasses.dataclass(frozen=True)
class Pace:
    """Seconds of one step of a run, and what the whole run takes."""

    run: str
    steps: int  # of all seeds and learning rates; 0 where nothing is trained
    step_seconds: float
    bound: str  # compute | memory | network, by the roofline; or mfu, where the stated share is slower
    tokens_per_second: float  # of the training batches, padding included
    hours: float  # training, sampling, evaluations, score tables (recall's without its prefix) but for pairs


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
    """Of every run whose programs were compiled; of one that is not trained, the scoring."""
    mfu = sketch.stated.mfu
    by_run = {(f.kind, name): f for f in figures if not f.fault for name in f.runs}
    out = []
    for run in sketch.runs.values():
        figure, score = by_run.get(("train", run.name)), by_run.get(("score", run.name))
        if score and not run.train_roles:
            total = _scoring_seconds(sketch, run, score, chip)
            out.append(Pace(run.name, 0, 0.0, score.bound(chip)[0], 0.0, total / 3600))
        if figure is None:
            continue
        bound, seconds = figure.bound(chip)
        at_share = step_flops(sketch, run) / (chips * chip.peak * mfu) * figure.products
        if at_share > seconds:
            bound, seconds = "mfu", at_share
        recipe = sketch.recipe(run)
        steps = sketch.steps(run) * sketch.fits(run)
        total = steps * (seconds + _sampling_seconds(sketch, run, by_run, chip))
        total += len(run.seeds) * _text_seconds(sketch, run, by_run, chip)
        if score:
            total += _scoring_seconds(sketch, run, score, chip)
        rate = recipe.batch_rows * sketch.row_length / seconds
        out.append(Pace(run.name, steps, seconds, bound, rate, total / 3600))
    return out


def _scoring_seconds(sketch: Sketch, run: Run, score: Figures, chip: Chip) -> float:
    """The tables of every seed, and the evaluations during training."""
    batches = lambda examples: -(-sketch.rows(examples, packed=True) // score.rows)
    count = batches(sketch.scored_examples()) * sketch.tables(run) * len(run.seeds)
    if run.train_roles:
        evaluations = (sketch.recipe(run).evaluations + 1) * sketch.fits(run)
        count += evaluations * 3 * batches(sketch.config.probe.examples)
    return count * score.bound(chip)[1]


def _batch_seconds(by_run: dict, run: Run, new: int, chip: Chip) -> tuple[float, float, int]:
    """Seconds that a call of the sampler makes weights ready; those of one batch of prompts, none ending before `new`
    tokens; rows of that batch."""
    ready, prefill, decode = (by_run.get((kind, run.name)) for kind in ("prepare", "prefill", "decode"))
    if ready is None or prefill is None or decode is None:
        return 0.0, 0.0, 1
    batch = prefill.bound(chip)[1] + new * decode.bound(chip)[1] / decode.chunks
    return ready.bound(chip)[1], batch, prefill.rows


def _sampling_seconds(sketch: Sketch, run: Run, by_run: dict, chip: Chip) -> float:
    """Of one step's samples, on average: as many steps sample as the policy lets at most."""
    o = sketch.objective(run)
    if not o.on_policy:
        return 0.0
    new = o.sampling(sketch.config.data.max_length).max_new_tokens
    ready, seconds, rows = _batch_seconds(by_run, run, new, chip)
    prompts = sketch.recipe(run).batch_rows
    share = {"mix": o.lmbda, "mix_replay": o.lmbda, "adaptive": 1.0, "mixed_rollouts": 1.0 / o.passes}[o.policy]
    calls, batches = 1.0, -(-prompts // rows)
    if o.policy_gradient:  # one call samples for many steps
        calls, batches = prompts / o.rollouts, prompts / rows
    return share * (calls * ready + batches * seconds)


def _text_seconds(sketch: Sketch, run: Run, by_run: dict, chip: Chip) -> float:
    """Of teacher text for all records of a run (shared with other runs, counted with each)."""
    o = sketch.objective(run)
    if o.policy != "teacher":
        return 0.0
    new, examples = o.sampling(sketch.config.data.max_length).max_new_tokens, sketch.examples(run.train_roles)
    ready, seconds, rows = _batch_seconds(by_run, run, new, chip)
    return -(-examples // SHARD) * ready + -(-examples // rows) * seconds
