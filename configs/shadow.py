"""Attacks by many models: 16 chains teacher -> student on random halves of Dolly's short records, 2 CPU cores.

    python main.py --config=configs/shadow.py --config.data.path=.../databricks-dolly-15k.jsonl.gz --workdir=runs/shadow
    python main.py --config=configs/shadow.py:two_by_two --config.data.path=...
    python main.py --config=configs/shadow.py:cheap --config.data.path=...

Models are of a `shadow` size, which every table names: small enough that a teacher and its student take a minute. Word-
level KD on public records (`disjoint`); the study's own runs (teacher, controls, students) are of the same size, and
stand beside the chains in the report, with white-box attacks and canaries.
default: 8 complementary pairs, which RMIA and LiRA with a pooled spread need; LiRA's spread per record asks for 33
pairs, `--config.shadow.chains=66`. `two_by_two`: 4 quadruples, each record in or out of the teacher's and of the
student's data: direct, inherited and interaction effects. `cheap`: two teachers and 8 students of each, whose spread
is that of their seeds alone: a calibrated score, never a bound.
"""

from ml_collections import ConfigDict

from configs import base

DESIGNS = ("full", "cheap", "two_by_two")


def get_config(design: str = "full") -> ConfigDict:
    if design not in DESIGNS:
        raise ValueError(f"configs/shadow.py:{design}: known are {', '.join(DESIGNS)}")
    config = base.get_config()
    config.title = "Dolly: shadow chains of small GPT-2 models from scratch"
    config.data.max_chars = 360  # short records, so that a CPU can read them often
    config.data.template = "plain"  # the Alpaca header would be most of a short record
    config.data.max_length = 192
    config.data.max_prompt = 144
    config.data.row_length = 256
    config.data.minimum = 1000
    # RMIA resolves 0.1 % only with 1000 records that no model was trained on.
    config.data.roles = ConfigDict(dict(private=0.2, public=0.2, heldout=0.2, dev=0.08, calib=0.12, population=0.2))
    config.data.canaries.update(per_cell=20, repeats=(1, 16))
    config.tokenizer.train_size = 2048
    size = dict(model_type="gpt2", n_embd=96, n_layer=2, n_head=4)
    config.models.teacher.scratch, config.models.student.scratch = size, size
    config.recipes.matched = base.recipe(
        "matched", steps=400, batch_rows=8, lr=3e-3, warmup_steps=30, evaluations=2, checkpoints=1
    )
    small = dict(init="base_student", recipe="matched")
    taught = dict(**small, teacher="teacher", setting="disjoint", train_roles=("public",))
    config.runs = ConfigDict(
        dict(
            base_teacher=base.run("teacher"),
            base_student=base.run("student"),
            teacher=base.run("teacher", "sft", init="base_teacher", recipe="matched", train_roles=("private",)),
            direct=base.run("student", "sft", **small, train_roles=("private",)),
            null=base.run("student", "sft", **small, train_roles=("public",)),
        )
    )
    for technique in ("kd", "seqkd"):
        config.objectives[technique] = base.objective(technique, max_new_tokens=64)
        config.runs[f"students/{technique}"] = base.run("student", technique, **taught)
    config.shadow.update(design=design, chains=16)
    config.whitebox.update(runs=("teacher", "students/kd", "students/seqkd", "null"), examples=400, draws=4)
    config.attack.bootstrap = 500
    return config
