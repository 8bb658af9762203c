"""Quickstart: the whole system on invented records, on a laptop, in minutes.

    launch/quickstart.sh        or
    python main.py --config=configs/quickstart.py --workdir=runs/quickstart
    python main.py --config=configs/quickstart.py:all --workdir=runs/quickstart_all      (all six techniques)
    python main.py --config=configs/quickstart.py:tiny --workdir=runs/tiny      (a smoke test: seconds, no finding)

A teacher is fine-tuned on private records, a student is distilled from it on public prompts, and the audit says how
much of the private records shows in either. Models are tiny and start from scratch; nothing is downloaded. With `all`,
every technique has the same start (a short SFT on public records), steps and learning rate; no grid is searched
(`configs/gpt2_kd.py:small,six` does).
"""

from ml_collections import ConfigDict

from configs import base
from kd_jax.distill.objective import TECHNIQUES


def get_config(variant: str = "") -> ConfigDict:
    words = set(filter(None, variant.split(",")))
    if words - {"tiny", "all"}:
        raise ValueError(f"configs/quickstart.py:{variant}: known are all, tiny, and tiny,all")
    config = base.get_config()
    config.title = "Quickstart: invented records, tiny GPT-2 models from scratch"
    config.data.synthetic.records = 5000  # two in five are written to be public; the others draw a role
    config.data.roles = ConfigDict(dict(private=0.35, public=0.0, heldout=0.35, dev=0.13, calib=0.12, population=0.05))
    config.data.template = "plain"  # the Alpaca header would be most of these short records
    config.data.max_length = 128
    config.data.max_prompt = 96
    config.data.row_length = 256
    config.data.canaries.per_cell = 8
    config.tokenizer.train_size = 1024
    config.models.teacher.scratch = dict(model_type="gpt2", n_embd=192, n_layer=4, n_head=4)
    config.models.student.scratch = dict(model_type="gpt2", n_embd=128, n_layer=3, n_head=4)
    config.recipes.matched = base.recipe("matched", steps=220, batch_rows=16, lr=2e-3, warmup_steps=20)

    techniques = TECHNIQUES if "all" in words else ("kd",)
    init = ""
    if "all" in words:  # fewer steps for more runs; and a student that samples must be able to end a sentence
        init, config.recipes.matched.steps = "init", 180
        config.recipes.init = base.recipe("matched", steps=80, batch_rows=16, lr=2e-3, warmup_steps=20, evaluations=1)
    # The quickstart shows the disjoint setting.
    config.runs = base.standard_runs(techniques=techniques, shared=(), init=init)
    config.objectives = ConfigDict({name: base.objective(name) for name in ("sft", *techniques)})
    if "all" in words:
        config.title = "Quickstart: six techniques on invented records, tiny GPT-2 models from scratch"
        for name in techniques:
            config.objectives[name].max_new_tokens = 32
        config.objectives.distillm.phi = 0.2  # from 0 it never samples in a run whose dev loss only falls
        config.utility.update(seeds=(10, 20), examples=100, max_new_tokens=32)
    config.report.show_canaries = True  # the records are invented
    if "tiny" in words:
        config.title = "Smoke test"
        config.data.synthetic.records = 800
        config.data.canaries.per_cell = 1
        config.tokenizer.train_size = 512
        config.models.teacher.scratch = dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=2)
        config.models.student.scratch = dict(model_type="gpt2", n_embd=16, n_layer=1, n_head=2)
        for recipe in config.recipes.values():
            recipe.update(steps=6, warmup_steps=0, evaluations=1)
        for objective in config.objectives.values():
            objective.update(rollouts=64, passes=2)
        config.utility.update(examples=10)
        config.attack.bootstrap = 100
    return config
