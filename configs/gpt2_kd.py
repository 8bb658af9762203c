"""GPT-2 XL to large, medium or base on Dolly, word-level KD, as zhang2025 trained it; or small from scratch.

    python main.py --config=configs/gpt2_kd.py[:large|medium|base] --config.data.path=databricks-dolly-15k.jsonl
    python main.py --config=configs/gpt2_kd.py:base,zhang2025 ... --config.data.lm.path=openwebtext.jsonl
    python main.py --config=configs/gpt2_kd.py:small[,base|,six|,mixed] --config.data.path=... --workdir=runs/dolly

Paper size (default `base`): hub ids gpt2-xl and gpt2-large / gpt2-medium / gpt2, or folders by
`--config.models.teacher.path` and `--config.models.student.path`. Hyper-parameters are those of the released scripts
(papers list no number of GPUs; the global batch here is theirs per GPU times GPUS). Response loss, AdamW, cosine. With
`,zhang2025`, `,distillm` or `,minillm` all techniques of that paper by its own recipes (`configs/published.py`).

`small`: 3-layer students and 4-layer teachers from random weights, 2 CPU cores, under 25 minutes. `small,base`: the
bases are first pre-trained on plain text, `--config.data.pretrain.path=.../train.txt.gz`, 20 minutes more. `small,six`:
all six techniques by the `matched` recipe with three seeds, under 75 minutes. `small,mixed`: mixed supervision
(cui2026): students on the teacher's own records, the teacher's weight alpha (kd_ratio) at 0, 0.25, 0.5, 0.75 and 1.
"""

from ml_collections import ConfigDict

from configs import base, published
from kd_jax.distill.objective import TECHNIQUES

GPUS = 4
STUDENTS = {"large": ("gpt2-large", 4), "medium": ("gpt2-medium", 8), "base": ("gpt2", 16)}  # hub id, batch per GPU


def get_config(variant: str = "base") -> ConfigDict:
    words = variant.split(",")
    if words[:1] == ["small"] and words[1:] in (["six"], ["mixed"]):
        return {"six": six, "mixed": mixed}[words[1]]()
    if words in (["small"], ["small", "base"]):
        return small(pretrained=words[1:] == ["base"])
    if words[0] not in STUDENTS or len(words) > 2:
        raise ValueError(
            f"configs/gpt2_kd.py:{variant}: known are {', '.join(STUDENTS)}, each alone or with a paper "
            f"({', '.join(published.PAPERS)}), small, small,base, small,six and small,mixed"
        )
    hub_id, batch = STUDENTS[words[0]]
    config = base.get_config()
    config.title = f"Dolly: GPT-2 XL to {hub_id}, word-level KD"
    config.models.teacher.path = "gpt2-xl"
    config.models.student.path = hub_id
    config.data.long_prompt = "drop"
    config.data.pack = False  # the papers train one record a row
    common = dict(lr=5e-5, lr_min=1e-7, compute_dtype="bfloat16", remat=True, checkpoints=10)
    config.recipes = ConfigDict(
        dict(
            teacher=base.recipe("zhang2025", epochs=5, batch_rows=4 * GPUS, **common),
            student=base.recipe("zhang2025", epochs=5, batch_rows=4 * GPUS, **common),
            kd=base.recipe("zhang2025", epochs=10, batch_rows=batch * GPUS, **common),
        )
    )
    config.runs = base.standard_runs("teacher", "student", "kd")
    if words[1:]:
        config.title = f"Dolly: GPT-2 XL to {hub_id}, techniques and recipes of {words[1]}"
        published.apply(config, words[1], "gpt2", words[0], GPUS)
    return config


def small(pretrained: bool) -> ConfigDict:
    config = base.get_config()
    config.title = "Dolly: small GPT-2 models " + ("from bases pre-trained here" if pretrained else "from scratch")
    config.data.max_chars = 360  # short records, so that a CPU can read them often
    config.data.limit = 4800
    config.data.max_length = 192
    config.data.max_prompt = 144
    config.data.row_length = 256
    config.data.minimum = 1000
    config.tokenizer.train_size = 4096
    config.models.teacher.scratch = dict(model_type="gpt2", n_embd=256, n_layer=4, n_head=4)
    config.models.student.scratch = dict(model_type="gpt2", n_embd=192, n_layer=3, n_head=3)
    config.recipes.matched = base.recipe("matched", steps=640, batch_rows=8, lr=2e-3, warmup_steps=50)
    config.runs = base.standard_runs()
    if pretrained:
        config.data.pretrain.limit = 450  # articles of WikiText-2's 600: what 20 minutes on 2 cores read once
        config.recipes.base = base.recipe("base", epochs=1, batch_rows=16, lr=2e-3, warmup_steps=50)
        for name in ("base_teacher", "base_student"):
            config.runs[name].update(train_roles=("pretrain",), recipe="base")
    return config


def six() -> ConfigDict:
    """Six techniques, equal in init, steps, prompts and their order, and a learning rate picked from one grid."""
    config = small(pretrained=False)
    config.title = "Dolly: six techniques, small GPT-2 models from scratch, three seeds"
    seeds = (0, 1, 2)
    common = dict(batch_rows=8, warmup_steps=20, checkpoints=1)
    config.recipes = ConfigDict(
        dict(
            teacher=base.recipe("matched", steps=500, lr=2e-3, evaluations=1, **common),
            init=base.recipe("matched", steps=100, lr=2e-3, evaluations=1, **common),
            matched=base.recipe("matched", steps=200, lr_grid=(1e-3, 3e-3, 9e-3), evaluations=4, **common),
        )
    )
    config.objectives = ConfigDict({name: base.objective(name, max_new_tokens=64) for name in ("sft", *TECHNIQUES)})
    config.objectives.distillm.phi = 0.2  # from 0 it never samples in a run whose dev loss only falls
    config.runs = base.standard_runs(
        "teacher", "matched", "matched", techniques=TECHNIQUES, shared=(), init="init", seeds=seeds
    )
    config.utility.update(seeds=(10, 20), examples=150, max_new_tokens=64)
    return config


def mixed() -> ConfigDict:
    """One teacher's weight swept, all else equal: do its signal and the labels together teach more than either?"""
    config = small(pretrained=False)
    config.title = "Dolly: mixed supervision, small GPT-2 models from scratch, three seeds"
    seeds, common = (0, 1, 2), dict(lr=2e-3, batch_rows=8, warmup_steps=20, checkpoints=1, evaluations=1)
    config.recipes = ConfigDict(
        dict(teacher=base.recipe("matched", steps=500, **common), matched=base.recipe("matched", steps=300, **common))
    )
    config.runs = base.standard_runs("teacher", "matched", "matched", techniques=(), shared=(), swapped=(), seeds=seeds)
    del config.runs["swap"]
    for percent in (0, 25, 50, 75, 100):
        name = f"alpha_{percent}"
        config.objectives[name] = base.objective("cui", kd_ratio=percent / 100)
        student = dict(init="base_student", train_roles=("private",), teacher="teacher", recipe="matched", seeds=seeds)
        config.runs[f"students/{name}"] = base.run("student", "kd", objective=name, setting="shared", **student)
    config.attack.headline = "students/alpha_50"
    config.score.pairs = ("students",)
    return config
