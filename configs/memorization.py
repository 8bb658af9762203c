"""What is memorized, by whom, and whether a student inherits it: small GPT-2 models from scratch, on 2 CPU cores.

    python main.py --config=configs/memorization.py:wikitext --config.data.path=.../wikitext2/train.txt.gz
    python main.py --config=configs/memorization.py:dolly --config.data.path=.../databricks-dolly-15k.jsonl.gz
    python main.py --config=configs/memorization.py:filter --config.data.path=.../wikitext2/train.txt.gz

`wikitext` (borkar2026): paragraphs of plain text, some trained on 4, 16 or 64 times, and invented canaries; word-level
KD at T = 1, 2, 3, 4 and hard labels on the teacher's own records (`shared`), and KD on public ones (`disjoint`).
`dolly` (singh2025): responses to instructions; word-level KD, sequence KD and reverse KL on the teacher's own records,
and KD on public ones.
`filter` (borkar2026): distil, predict what the student memorizes, distil again without it, by the same teacher; beside
it a student without as many records drawn at random, and one without those that a classifier flagged which never saw
their labels.
"""

from ml_collections import ConfigDict

from configs import base

TEMPERATURES = (1, 2, 3, 4)


def get_config(variant: str = "wikitext") -> ConfigDict:
    variants = {"wikitext": wikitext, "dolly": dolly, "filter": filtered}
    if variant not in variants:
        raise ValueError(f"configs/memorization.py:{variant}: known are {', '.join(variants)}")
    return variants[variant]()


def _small() -> ConfigDict:
    config = base.get_config()
    config.models.teacher.scratch = dict(model_type="gpt2", n_embd=192, n_layer=4, n_head=4)
    config.models.student.scratch = dict(model_type="gpt2", n_embd=128, n_layer=3, n_head=4)
    config.tokenizer.train_size = 2048
    config.score.pairs = ("students", "teacher:direct")
    config.score.temperatures, config.score.top_k = (1.0,), (40,)
    config.attack.bootstrap = 500
    config.memorization.continue_examples = 60
    return config


def _runs(**students: ConfigDict) -> ConfigDict:
    """Bases, teacher, direct and null, and these students; all of one recipe and from the same start."""
    big = dict(technique="sft", init="base_teacher", recipe="matched")
    small = dict(init="base_student", recipe="matched")
    runs = dict(
        base_teacher=base.run("teacher"),
        base_student=base.run("student"),
        teacher=base.run("teacher", **big, train_roles=("private",)),
        direct=base.run("student", "sft", **small, train_roles=("private",)),
        null=base.run("student", "sft", **small, train_roles=("public",)),
    )
    for name, student in students.items():
        runs[f"students/{name}"] = student
    return ConfigDict(runs)


def _student(technique: str, setting: str, objective: str = "", **keys) -> ConfigDict:
    roles = {"shared": ("private",), "disjoint": ("public",)}[setting]
    own = dict(init="base_student", recipe="matched", teacher="teacher", train_roles=roles)
    return base.run("student", technique, setting=setting, objective=objective, **own, **keys)


def _text() -> ConfigDict:
    """Plain text: paragraphs cut into windows, a part of which is repeated; cuts of 32 + k tokens."""
    config = _small()
    config.data.text_unit = "paragraph"
    config.data.template = "text"
    config.data.limit = 900
    config.data.minimum = 150
    config.data.max_length = 96
    config.data.row_length = 192
    config.data.max_prompt = 48
    config.data.repeated.share = 0.12
    config.recipes = ConfigDict(
        dict(matched=base.recipe("matched", steps=200, batch_rows=16, lr=2e-3, warmup_steps=20))
    )
    config.objectives = ConfigDict(dict(sft=base.objective("sft")))
    for t in TEMPERATURES:
        config.objectives[f"kd_t{t}"] = base.objective("kd", student_T=float(t), teacher_T=float(t))
    config.memorization.cuts = ((32, 10), (32, 20), (32, 32), (32, 50))
    config.memorization.continue_suffix = 50
    return config


def wikitext() -> ConfigDict:
    config = _text()
    config.title = "WikiText-2: memorization by repeats and temperature, small GPT-2 models from scratch"
    config.data.canaries.update(per_cell=12, repeats=(4, 16, 64))
    config.objectives.seqkd_hard = base.objective("borkar_hard", prefix=32)
    students = {f"kd_shared_t{t}": _student("kd", "shared", f"kd_t{t}") for t in TEMPERATURES}
    students["seqkd_shared"] = _student("seqkd", "shared", "seqkd_hard")
    students["kd"] = _student("kd", "disjoint", "kd_t2")
    config.runs = _runs(**students)
    config.attack.headline = "students/kd_shared_t2"
    config.memorization.coverage_texts = 20
    return config


def filtered() -> ConfigDict:
    config = _text()
    config.title = "WikiText-2: distil, predict, filter, distil again; small GPT-2 models from scratch"
    first = "students/kd_shared"  # at T = 1: at 2 a student of this size memorizes nothing that could be filtered
    students = {"kd_shared": _student("kd", "shared", "kd_t1")}
    for form in ("predicted", "transferred", "random"):
        students[f"kd_shared_{form}"] = _student("kd", "shared", "kd_t1", exclude=f"{form}:{first}")
    config.runs = _runs(**students)
    config.attack.headline = first
    return config


def dolly() -> ConfigDict:
    config = _small()
    config.title = "Dolly: memorization by technique, small GPT-2 models from scratch"
    config.data.max_chars = 360  # short records, so that a CPU can read them often
    config.data.limit = 1600
    config.data.minimum = 250
    config.data.max_length = 192
    config.data.max_prompt = 144
    config.data.row_length = 256
    config.data.repeated.share = 0.12
    config.recipes = ConfigDict(dict(matched=base.recipe("matched", steps=200, batch_rows=8, lr=2e-3, warmup_steps=20)))
    names = dict(sft="sft", kd="singh_kd", seqkd="singh_seqkd", minillm="minillm")
    config.objectives = ConfigDict({name: base.objective(preset) for name, preset in names.items()})
    for name in ("seqkd", "minillm"):
        config.objectives[name].max_new_tokens = 64
    students = {f"{name}_shared": _student(name, "shared") for name in names if name != "sft"}
    students["kd"] = _student("kd", "disjoint")
    config.runs = _runs(**students)
    config.attack.headline = "students/kd_shared"
    config.memorization.decodings = ("greedy", "zhang2025")
    return config
