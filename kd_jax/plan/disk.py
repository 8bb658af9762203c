"""What a config writes: bytes of score tables, teacher caches, teacher text, checkpoints, against the disk.

Upper bounds for the shares of the roles and the mean lengths that `config.plan` states: nothing counts as compressed.
Left out is what is small beside them: prepared records, ledgers, metrics, ROUGE of answers, tables of texts.
"""

from __future__ import annotations

import math

import jax
import numpy as np

from kd_jax import lora, pairs
from kd_jax.errors import ConfigError
from kd_jax.graph import Run
from kd_jax.head import PAIR_FIELDS
from kd_jax.plan.sketch import Sketch
from kd_jax.score import FIELDS
from kd_jax.teacher_cache import CacheSpec
from kd_jax.transformer import Transformer

ROW_BYTES = 64  # ids and sizes of an example in a score table
# Parquet keeps up to 1 MiB of distinct values as a dictionary: 18 bits beside each 4 bytes that do not repeat, and a
# bit that says where a list begins, 1.59 in all. Tables made here took 0.80 to 0.94.
PARQUET = 1.6
LOWERED = 1.5  # tokens of a lower-cased text to one of its own, at most: GPT-2's tokenizer makes 1.03 of Dolly's


def score_token_bytes(temperatures: tuple[float, ...], top_k: tuple[int, ...], top_p: tuple[float, ...]) -> int:
    """Of one scored token in a score table before zstd: target id, segment (1 byte) and its fields, 4 bytes each."""
    grid = len(temperatures) * (1 + len(top_k) + 2 * len(top_p))
    return 4 * (1 + len(FIELDS) + grid) + 1


def pair_token_bytes() -> int:
    """Of one scored token in a pair table before zstd: target id, segment (1 byte) and its fields."""
    return 4 + 1 + sum(np.dtype(dtype).itemsize for dtype in PAIR_FIELDS.values())


def cache_token_bytes(kind: str, dtype: str, k: int, width: int) -> int:
    """Of one scored token in a teacher cache."""
    spec = CacheSpec(kind=kind, dtype=dtype, k=k if kind == "top_k" else 0)
    return sum(d.itemsize * n for d, n in spec.columns(width).values())


def needs(sketch: Sketch) -> dict[str, float]:
    """Bytes by kind. Raises ConfigError where `score.pairs` names runs that do not exist."""
    runs, trained = sketch.runs.values(), [run for run in sketch.runs.values() if run.train_roles]
    found = {"score tables": sum(_score_bytes(sketch, run) for run in runs) + _pair_bytes(sketch)}
    found["checkpoints"] = _all_checkpoint_bytes(sketch, trained)
    found["trajectory"] = float(sum(sketch.kept(r) * _folders(sketch, r) * _sizes(sketch, r)[0] for r in trained))
    caches = {_cache_identity(sketch, run): _cache_bytes(sketch, run) for run in trained if _is_cached(sketch, run)}
    found["teacher caches"] = float(sum(caches.values()))
    each = ROW_BYTES + 4 * sketch.config.data.max_length
    texts = {
        _text_identity(sketch, run): len(run.seeds) * sketch.examples(run.train_roles) * each
        for run in trained
        if sketch.objective(run).policy == "teacher"
    }
    found["teacher text"] = float(sum(texts.values()))
    return found


def _score_bytes(sketch: Sketch, run: Run) -> float:
    """All score tables of a run."""
    s, tokens = sketch.config.score, sketch.stated.scored_tokens
    token = score_token_bytes(tuple(s.temperatures), tuple(s.top_k), tuple(s.top_p))
    lowered = (LOWERED - 1) * tokens * token if "lowercase" in s.variants else 0
    one = sketch.tables(run) * (ROW_BYTES + tokens * token) + lowered
    return float(PARQUET * len(run.seeds) * sketch.scored_examples() * one)


def _pair_bytes(sketch: Sketch) -> float:
    """A table for every pair and seed of its student."""
    row = ROW_BYTES + sketch.stated.scored_tokens * pair_token_bytes()
    students = [sketch.runs[b] for _, b in pairs.chosen(tuple(sketch.config.score.pairs), sketch.runs)]
    return float(PARQUET * sketch.scored_examples() * row * sum(len(run.seeds) for run in students))


def _all_checkpoint_bytes(sketch: Sketch, trained: list[Run]) -> float:
    """Of all runs, and of the one with the largest state what is there while a newer checkpoint is written.

    That is one more than are kept, however few `recipe.checkpoints` are: a run that is preempted saves besides.
    """
    largest = max((_sizes(sketch, run)[1] for run in trained), default=0)
    return sum(_checkpoint_bytes(sketch, run) for run in trained) + float(largest)


def _checkpoint_bytes(sketch: Sketch, run: Run) -> float:
    """Kept checkpoints, final parameters, and the selected ones: an upper bound, since a finished run keeps fewer."""
    model, state = _sizes(sketch, run)
    one = sketch.config.checkpoints.keep * state + model * (1 if sketch.recipe(run).select == "last" else 2)
    return float(_folders(sketch, run) * one)


def _folders(sketch: Sketch, run: Run) -> int:
    """Folders that hold parameters of a run: one a training, and where a grid was searched that of the chosen one."""
    return sketch.fits(run) + sketch.searches(run)


def _sizes(sketch: Sketch, run: Run) -> tuple[int, int]:
    """Bytes of a run's parameters, and of its training state: trained weights with AdamW's two moments."""
    recipe, cfg = sketch.recipe(run), sketch.shapes[run.model].cfg

    def make(key):
        model = Transformer(cfg, key)
        return model, lora.split(lora.attach(model, recipe.lora, key))[0]

    model, trainable = jax.eval_shape(make, jax.eval_shape(lambda: jax.random.key(0)))
    size = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
    return size(model), 3 * size(trainable)


def _is_cached(sketch: Sketch, run: Run) -> bool:
    return sketch.recipe(run).cache != "none" and sketch.compares(run) and not sketch.objective(run).on_policy


def _text_identity(sketch: Sketch, run: Run) -> object:
    o = sketch.objective(run)
    return run.teacher, run.seeds, run.train_roles, o.sampling(1), o.prefix, sketch.recipe(run).compute_dtype


def _cache_identity(sketch: Sketch, run: Run) -> object:
    r, o = sketch.recipe(run), sketch.objective(run)
    data = _text_identity(sketch, run) if o.policy == "teacher" else (run.teacher, run.seeds, run.train_roles)
    return data, r.cache, r.cache_dtype, r.cache_k, r.compute_dtype, o.teacher_T


def _cache_bytes(sketch: Sketch, run: Run) -> float:
    recipe, width = sketch.recipe(run), sketch.shapes[sketch.runs[run.teacher].model].cfg.embed_dim
    each, o = sketch.stated.scored_tokens, sketch.objective(run)
    if o.policy == "teacher":  # as long as it may become
        each = o.prefix + o.sampling(sketch.config.data.max_length).max_new_tokens
    tokens = sketch.examples(run.train_roles) * each * len(run.seeds)
    return float(tokens * cache_token_bytes(recipe.cache, recipe.cache_dtype, recipe.cache_k, width))


def check(needed: dict[str, float], available: int | None, workdir: str) -> None:
    """Raises ConfigError where the sum does not fit, naming the largest part and what makes it smaller."""
    total = sum(needed.values())
    if available is None or total <= available:
        return
    name, size = max(needed.items(), key=lambda item: item[1])
    advice = {
        "score tables": "score fewer roles or score.variants, or fewer score.temperatures, score.top_k and score.top_p",
        "checkpoints": "give runs fewer seeds, or recipes a single learning rate",
        "trajectory": "lower score.trajectory",
        "teacher caches": "set the recipe's cache_dtype to bfloat16, its cache to top_k (biased) or none",
        "teacher text": "lower data.max_length",
    }[name]
    raise ConfigError(
        f"{workdir} has {available / 1e9:.1f} GB free, the config writes up to {total / 1e9:.1f} GB, most of it "
        f"{name} ({size / 1e9:.1f} GB): {advice}, or use another --workdir (a bucket, gs://, has no such limit)"
    )
