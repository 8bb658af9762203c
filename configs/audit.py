"""Audit checkpoints that were trained elsewhere: nothing is trained, they are scored as they are.

    python main.py --config=configs/audit.py --workdir=runs/audit --config.student=HF_FOLDER \\
        --config.teacher=HF_FOLDER --config.reference=HF_FOLDER --config.members=a.jsonl --config.nonmembers=b.jsonl

student: the model in question, a Hugging Face folder or hub id in safetensors.
teacher, reference: optional. The student's teacher; a model that never saw the members (the student's base, say), which
    calibrates the strongest attacks. One with another tokenizer is scored with its own.
members, nonmembers: the records that the teacher, or the student itself, was trained on, and records of the same kind
    that no model saw. Instructions or plain text, in any format of `kd_jax/data/records.py`.
calib_share: of both files, kept out of every evaluation, for thresholds and ReCaLL's shots.

Keys of `configs/base.py` that matter here: `data.template` (alpaca, plain or text: how the model was trained on
instructions), `data.bos`, `data.max_length`, `data.group_key`, `tokenizer.path` (where the student's folder has none),
`score.variants`, `score.pairs="('teacher:student',)"` for tables of student and teacher token by token.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.title = "Audit of checkpoints trained elsewhere"
    config.student = ""
    config.teacher = ""
    config.reference = ""
    config.members = ""
    config.nonmembers = ""
    config.calib_share = 0.1  # in [0, 0.9)

    config.data.minimum = 25  # members, and non-members, left to evaluate
    config.data.bos = "family"  # or none | bos | eos; family: LLaMA and OPT begin with BOS, the others with nothing
    config.data.max_length = 0  # tokens; 0 = 512, or what the shortest context takes
    config.data.max_prompt = 0  # tokens; 0 = half of data.max_length
    config.data.text_unit = "paragraph"  # of .txt files: article | paragraph | line

    names = ("student", "teacher", "reference")
    config.models = ConfigDict({name: base.model() for name in names})  # their paths are the three keys above
    config.runs = ConfigDict({name: base.run(name) for name in names})
    config.recipes = ConfigDict()
    config.objectives = ConfigDict(dict(sft=base.objective("sft")))
    config.score.roles = ("private", "heldout", "calib")
    config.score.variants = ("recall", "lowercase")  # recall is left out where a context has no room for a shot
    config.attack.headline = "student"
    config.attack.references = ("reference",)
    return config
