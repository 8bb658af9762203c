"""LLaMA-2 7B to a 1.1B LLaMA with LLaMA-2's tokenizer on Dolly, word-level KD; or OpenLLaMA 7B to 3B.

    python main.py --config=configs/llama2_kd.py --config.data.path=databricks-dolly-15k.jsonl
    python main.py --config=configs/llama2_kd.py:openllama[,zhang2025|,distillm|,minillm] ...

LLaMA-2's weights are gated: accept its licence on the hub and log in, or give a folder with
`--config.models.teacher.path`. Without a paper's name every weight is trained, with MiniLLM's learning rate for full
fine-tuning (1e-5, 10 epochs, batch 8 per GPU). zhang2025 and DistiLLM trained OpenLLaMA 7B to 3B with LoRA (rank 16,
alpha 64, dropout 0.1; the teacher's adapter merged first): `,zhang2025` and `,distillm` do the same, with all six
techniques, and need plain text in `data.lm.path`.
KD: 1e-5, 10 epochs, batch 4 per GPU, kd_ratio 0.5, as both codes have it. Global batch: per GPU times GPUS.
OpenLLaMA publishes pickles: see README, "Checkpoints that are pickles".
"""

from ml_collections import ConfigDict

from configs import base, published

GPUS = 8
PAIRS = {
    "": ("meta-llama/Llama-2-7b-hf", "TinyLlama/TinyLlama_v1.1"),
    "openllama": ("openlm-research/open_llama_7b", "openlm-research/open_llama_3b"),
}


def get_config(variant: str = "") -> ConfigDict:
    words = variant.split(",")
    if words[0] not in PAIRS or len(words) > 2:
        raise ValueError(
            f"configs/llama2_kd.py:{variant}: known are openllama, and with it a paper ({', '.join(published.PAPERS)})"
        )
    teacher, student = PAIRS[words[0]]
    config = base.get_config()
    config.title = f"Dolly: {teacher} to {student}, word-level KD"
    config.models.teacher.path = teacher
    config.models.student.path = student
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    config.data.long_prompt = "drop"
    config.data.pack = False
    config.data.bos = "bos"
    common = dict(lr=1e-5, lr_min=1e-7, compute_dtype="bfloat16", remat=True, checkpoints=10)
    config.recipes = ConfigDict(
        dict(
            teacher=base.recipe("minillm_sft", epochs=10, batch_rows=8 * GPUS, **common),
            student=base.recipe("minillm_sft", epochs=10, batch_rows=8 * GPUS, **common),
            kd=base.recipe("zhang2025", epochs=10, batch_rows=4 * GPUS, **common),
        )
    )
    config.objectives.kd = base.objective("kd", kd_ratio=0.5)
    config.runs = base.standard_runs("teacher", "student", "kd")
    if words[1:]:
        config.title = f"Dolly: {teacher} to {student}, techniques and recipes of {words[1]}"
        published.apply(config, words[1], "llama", "3b", GPUS)
    return config
