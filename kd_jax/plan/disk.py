"""What a config writes: bytes of score tables, teacher caches, teacher text, checkpoints, against the disk."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import jax

from kd_jax import lora
from kd_jax.errors import ConfigError
from kd_jax.graph import Run
from kd_jax.plan.sketch import Sketch
from kd_jax.score import FIELDS
from kd_jax.teacher_cache import CacheSpec
from kd_jax.transformer import Transformer

KEPT = 2  # checkpoints of a run (kd_jax.loop.Task.keep)
ROW_BYTES = 64  # ids and sizes of an example in a score table


def score_token_bytes(temperatures: tuple[float, ...], top_k: tuple[int, ...], top_p: tuple[float, ...]) -> int:
    """Of one scored token in a score table before zstd: target id, segment (1 byte) and its fields, 4 bytes each."""
    grid = len(temperatures) * (1 + len(top_k) + 2 * len(top_p))
    return 4 * (1 + len(FIELDS) + grid) + 1


def cache_token_bytes(kind: str, dtype: str, k: int, width: int) -> int:
    """Of one scored token in a teacher cache."""
    spec = CacheSpec(kind=kind, dtype=dtype, k=k if kind == "top_k" else 0)
    return sum(d.itemsize * n for d, n in spec.columns(width).values())


def needs(sketch: Sketch) -> dict[str, float]:
    """Bytes by kind, upper bounds: tables and caches uncompressed, checkpoints at their most."""
    runs, stated, s = sketch.runs.values(), sketch.stated, sketch.config.score
    roles = [role for role in s.roles if role in sketch.config.data.roles]
    scored = sum(math.ceil(sketch.config.data.roles[role] * sketch.records) for role in roles)
    row = ROW_BYTES + stated.scored_tokens * score_token_bytes(tuple(s.temperatures), tuple(s.top_k), tuple(s.top_p))
    found = {"score tables": float(scored * row * sum(len(run.seeds) for run in runs))}
    trained = [run for run in runs if run.train_roles]
    found["checkpoints"] = sum(_checkpoint_bytes(sketch, run) for run in trained)
    caches = {_cache_identity(sketch, run): _cache_bytes(sketch, run) for run in trained if _is_cached(sketch, run)}
    found["teacher caches"] = float(sum(caches.values()))
    texts = {
        (run.teacher, sketch.objective(run).sampling(1), run.train_roles): len(run.seeds)
        * sketch.examples(run.train_roles)
        * (ROW_BYTES + 4 * sketch.config.data.max_length)
        for run in trained
        if sketch.objective(run).policy == "teacher"
    }
    found["teacher text"] = float(sum(texts.values()))
    return found


def _checkpoint_bytes(sketch: Sketch, run: Run) -> float:
    """Kept checkpoints (trained weights and AdamW's two moments), final parameters, and the selected ones."""
    recipe, cfg = sketch.recipe(run), sketch.shapes[run.model].cfg

    def make(key):
        model = Transformer(cfg, key)
        return model, lora.split(lora.attach(model, recipe.lora, key))[0]

    model, trainable = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    one = KEPT * 3 * size(trainable) + size(model) * (1 if recipe.select == "last" else 2)
    grid = len(recipe.rates)
    return float(one * (len(run.seeds) + (grid if grid > 1 else 0)))


def _is_cached(sketch: Sketch, run: Run) -> bool:
    return sketch.recipe(run).cache != "none" and sketch.compares(run) and not sketch.objective(run).on_policy


def _cache_identity(sketch: Sketch, run: Run) -> object:
    r, o = sketch.recipe(run), sketch.objective(run)
    text = o.policy == "teacher" and o.sampling(1)
    return run.teacher, run.train_roles, text, r.cache, r.cache_dtype, r.cache_k, r.compute_dtype, o.teacher_T


def _cache_bytes(sketch: Sketch, run: Run) -> float:
    recipe, width = sketch.recipe(run), sketch.shapes[sketch.runs[run.teacher].model].cfg.embed_dim
    tokens = sketch.examples(run.train_roles) * sketch.stated.scored_tokens * len(run.seeds)
    return float(tokens * cache_token_bytes(recipe.cache, recipe.cache_dtype, recipe.cache_k, width))


def free(workdir: str) -> int | None:
    """Bytes free where the work directory is, or will be; None for a bucket, which has no end to measure."""
    if "://" in workdir:
        return None
    folder = Path(workdir).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check(needed: dict[str, float], available: int | None, workdir: str) -> None:
    """Raises ConfigError where the sum does not fit, naming the largest part and what makes it smaller."""
    total = sum(needed.values())
    if available is None or total <= available:
        return
    name, size = max(needed.items(), key=lambda item: item[1])
    advice = {
        "score tables": "score fewer roles, or fewer score.temperatures, score.top_k and score.top_p",
        "checkpoints": "give runs fewer seeds, or recipes a single learning rate",
        "teacher caches": "set the recipe's cache_dtype to bfloat16, its cache to top_k (biased) or none",
        "teacher text": "lower data.max_length",
    }[name]
    raise ConfigError(
        f"{workdir} has {available / 1e9:.1f} GB free, the config writes up to {total / 1e9:.1f} GB, most of it "
        f"{name} ({size / 1e9:.1f} GB): {advice}, or use another --workdir (a bucket, gs://, has no such limit)"
    )
