"""OPT 2.7B to 1.3B, 350M or 125M on Dolly, word-level KD, with zhang2025's hyper-parameters.

    python main.py --config=configs/opt_kd.py[:1.3b|350m|125m] --config.data.path=databricks-dolly-15k.jsonl
    python main.py --config=configs/opt_kd.py:125m,zhang2025 ... --config.data.lm.path=openwebtext.jsonl

With `,zhang2025`, `,distillm` or `,minillm` (1.3b) all techniques of that paper by its own recipes.
Meta published OPT as pickles: give folders converted once (README, "Checkpoints that are pickles"), or a revision of
the hub repository that holds safetensors. The published OPT scripts add a language-model loss on OpenWebText: without a
paper's name it is left out, with one `data.lm.path` must name the text. Global batch: theirs per GPU times GPUS.
"""

from ml_collections import ConfigDict

from configs import base, published

GPUS = 4
STUDENTS = {"1.3b": ("facebook/opt-1.3b", 4), "350m": ("facebook/opt-350m", 8), "125m": ("facebook/opt-125m", 16)}


def get_config(variant: str = "125m") -> ConfigDict:
    words = variant.split(",")
    if words[0] not in STUDENTS or len(words) > 2:
        raise ValueError(
            f"configs/opt_kd.py:{variant}: known are {', '.join(STUDENTS)}, each alone or with a paper "
            f"({', '.join(published.PAPERS)})"
        )
    hub_id, batch = STUDENTS[words[0]]
    config = base.get_config()
    config.title = f"Dolly: OPT 2.7B to {hub_id}, word-level KD"
    config.models.teacher.path = "facebook/opt-2.7b"
    config.models.student.path = hub_id
    config.data.long_prompt = "drop"
    config.data.pack = False
    config.data.bos = "bos"  # OPT was trained with </s> in front; the tokenizer's own BOS
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
        config.title = f"Dolly: OPT 2.7B to {hub_id}, techniques and recipes of {words[1]}"
        published.apply(config, words[1], "opt", words[0], GPUS)
    return config
