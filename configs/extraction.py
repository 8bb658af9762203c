"""Extraction from checkpoints that were trained elsewhere: can they complete texts that they are known to have seen?

    python main.py --config=configs/extraction.py --workdir=runs/extraction --config.student=HF_FOLDER \\
        --config.prefix=val_prefix.npy --config.suffix=val_suffix.npy

prefix, suffix: token ids [texts, tokens], .npy files such as those of google-research/lm-extraction-benchmark (1,000
    texts of the Pile, 50 + 50 GPT-2 ids, uint16). Row i of both is one text. Ids are used as they are, so the model's
    must be the same ones.
student: the model in question, a Hugging Face folder or hub id in safetensors. It is taken to have seen the texts.
teacher, reference: optional. The student's teacher; a model that never saw the texts, which shows what is merely easy
    to predict. Their ids must be the student's.

There are no non-members: nothing is said of membership, and a share is memorized only as far as `reference` has less.
Keys of `configs/base.py` that matter here: `tokenizer.path` (where the student's folder has none), `data.bos`,
`memorization.cuts` (prefix 0: the given prefix; the default is suffixes of 10, 20, 32 and 50 tokens),
`memorization.continue_examples` (texts whose suffix is generated as well), `score.top_k`.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.title = "Extraction from checkpoints trained elsewhere"
    config.student = ""
    config.teacher = ""
    config.reference = ""
    config.prefix = ""
    config.suffix = ""

    config.data.bos = "none"  # as the benchmark's texts are cut from the middle of documents
    config.data.max_length = 0  # tokens; 0 = 512, or what the shortest context takes

    names = ("student", "teacher", "reference")
    config.models = ConfigDict({name: base.model() for name in names})  # their paths are the three keys above
    config.runs = ConfigDict({name: base.run(name) for name in names})
    config.recipes = ConfigDict()
    config.objectives = ConfigDict(dict(sft=base.objective("sft")))
    config.score.roles = ("private",)
    config.score.temperatures, config.score.top_k = (1.0,), (40,)  # (n, p)-extraction as it is usually stated
    config.attack.headline = "student"
    config.attack.references = ("reference",)
    return config
