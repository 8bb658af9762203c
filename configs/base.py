"""Every key of an experiment, its default and its unit. Other configs start here and change what differs.

A run (`config.runs`) is: model, technique (none | sft | kd | seqkd | imitkd | gkd | minillm | distillm), init (a run;
"" for a base), train_roles, teacher (a run), recipe (how it is optimised), objective (with which loss on what; "" = the
technique's own), setting (- | disjoint | shared), swap_of (a run), exclude (what a filter found of a run's records:
predicted:RUN, transferred:RUN, random:RUN), seeds. A recipe's keys and units are the fields of `kd_jax.train.Recipe`,
an objective's those of `kd_jax.distill.objective.Objective`, a plan's those of `kd_jax.plan.stated.Stated`. Strings are
empty where nothing is chosen, numbers 0.
"""

import dataclasses

from ml_collections import ConfigDict

from kd_jax.distill.objective import PRESETS
from kd_jax.plan.stated import Stated
from kd_jax.train import Recipe


def recipe(name: str, **changes) -> ConfigDict:
    """A recipe by name: the defaults of `kd_jax.train.Recipe` with `changes`."""
    return ConfigDict(dataclasses.asdict(Recipe(name=name, **changes)))


def objective(preset: str, **changes) -> ConfigDict:
    """A technique, or a paper's variant of one, from `kd_jax.distill.objective.PRESETS`, with `changes`."""
    return ConfigDict(dataclasses.asdict(dataclasses.replace(PRESETS[preset], **changes)))


def run(model: str, technique: str = "none", **keys) -> ConfigDict:
    """An entry of `config.runs` with every key present, so that each can be overridden on the command line."""
    entry = dict(
        init="", train_roles=(), teacher="", recipe="", objective="", setting="-", swap_of="", exclude="", seeds=(0,)
    )
    return ConfigDict({"model": model, "technique": technique, **entry, **keys})


def model(path: str = "", revision: str = "", scratch: dict | None = None) -> ConfigDict:
    """A model from a Hugging Face folder or hub id, or drawn at random from a config of Hugging Face's keys."""
    return ConfigDict({"path": path, "revision": revision, "scratch": scratch or {}})


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.title = ""  # stands on the report
    config.seed = 0  # redraws the split and every model

    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices per axis; -1: all that are left

    config.data = ConfigDict(
        dict(
            path="",  # .jsonl[.gz] .json[.gz] .txt[.gz] .parquet
            dataset="",  # or a hub id for datasets.load_dataset
            split="train",  # of the hub data set
            format="auto",  # auto, or a name from kd_jax/data/records.py
            text_unit="article",  # of .txt files: article | paragraph | line
            fields=dict(instruction="", input="", response="", task=""),  # the source's names, where it has its own
            group_key="",  # field whose equal values share a role (a person, a passage)
            limit=0,  # records kept, chosen by seeded hash; 0 = all
            max_chars=0,  # longer records are left out before the split; 0 = none
            exclude_tasks=(),
            exclude="",  # ids.parquet[:column]: records that no run is trained on; they are still scored
            repeated=dict(share=0.0, times=(4, 16, 64)),  # of all roles alike; times an epoch
            synthetic=dict(records=0, overlap=0.5),  # invented corpus instead of a file; overlap in [0, 1]
            roles=dict(private=0.25, public=0.25, heldout=0.25, dev=0.1, calib=0.1, population=0.05),  # shares
            minimum=50,  # records that private and heldout need at least
            canaries=dict(per_cell=0, repeats=(1, 4, 16)),  # canaries per placement and repeat count; 0 = none
            template="alpaca",  # alpaca | plain | text
            joint=False,  # tokenise prompt and response together (a paper's recipe under fidelity=reference)
            bos="none",  # none | bos | eos: what stands before the first token
            max_length=512,  # tokens of a record
            row_length=0,  # tokens of a packed row; 0 = max_length
            max_prompt=256,  # tokens of a prompt
            long_prompt="keep_end",  # keep_end | drop
            pack=True,  # several records in a row; False: one record a row, as the papers train
            pretrain=dict(path="", text_unit="article", limit=0),  # plain text on which base_* runs train
            lm=dict(path="", text_unit="article", limit=0),  # plain text of objectives whose lm_coef is above 0
        )
    )
    config.tokenizer = ConfigDict(
        dict(
            path="",  # folder or hub id ...
            revision="",
            vocab="",  # ... or a vocabulary with its merges (.gz too) ...
            merges="",
            json="",  # ... or a bare tokenizer.json (.gz too) ...
            eos="",  # special tokens, where the tokenizer does not say which they are
            bos="",
            train_size=0,  # ... or a byte-level BPE of so many tokens, trained on the public role
        )
    )
    config.models = ConfigDict(dict(teacher=model(), student=model()))
    config.recipes = ConfigDict(dict(matched=recipe("matched")))
    config.objectives = ConfigDict({name: objective(name) for name in ("sft", "kd")})
    config.runs = ConfigDict()

    config.checkpoints = ConfigDict(  # training states: parameters, optimiser, position in the data
        dict(
            keep=2,  # of a run that is training, the newest; the selected parameters are kept besides
            finished=1,  # of a finished run; 0 frees the most, then damaged parameters mean training again
        )
    )
    config.score = ConfigDict(
        dict(
            roles=("private", "heldout", "dev", "calib", "canary"),
            batch_rows=8,  # packed rows a pass
            pairs=(),  # models compared token by token: "students" (each with its teacher), or "teacher:students/kd"
            trajectory=0,  # checkpoints of every run that are kept and scored, evenly spread, the last step among them
            variants=(),  # of every record, scored as well: recall recall_members lowercase neighbours
            precision="highest",  # of matrix products: highest | high | default
            temperatures=(),  # grid of lse_t<T>
            top_k=(),  # grid of topk_lse_k<K>_t<T>
            top_p=(),  # grid of cum_above_p<P>_t<T>, nucleus_p<P>_t<T>
        )
    )
    # At every evaluation of a run: examples of dev, private and heldout each; answers to dev prompts for ROUGE-L.
    config.probe = ConfigDict(dict(examples=200, rouge_examples=0))
    config.utility = ConfigDict(  # ROUGE of every run's answers, at the end
        dict(
            seeds=(),  # of sampling, e.g. (10, 20, 30, 40, 50); none = not measured
            roles=("dev",),  # whose prompts are answered
            files=ConfigDict(),  # and those of instruction files, by a name for the set
            examples=0,  # of each set; 0 = all
            temperature=1.0,  # 0 = greedy
            top_k=0,
            top_p=1.0,
            max_new_tokens=0,  # 0 = up to data.max_length
            no_repeat_ngram=0,  # the papers' test time bans repeated 6-grams; never mix with 0
        )
    )

    config.memorization = ConfigDict(
        dict(
            cuts=(),  # (prefix, suffix) in tokens; () = suffixes of 10, 20, 32, 50, after 50 tokens of a plain text
            continue_examples=0,  # records a role whose prefix is continued by generation, and all near ties; 0 = none
            continue_suffix=50,  # tokens generated, or as many as the longest cut
            decodings=("greedy",),  # and zhang2025: no repeated 6-gram, no EOS before the end
            coverage_texts=0,  # plain texts of private and of heldout that are scored in overlapping windows
            stride=10,  # tokens between these windows
        )
    )
    config.whitebox = ConfigDict(  # attacks that need the weights; they cost passes, so that nothing is chosen here
        dict(
            runs=(),  # whose weights are looked into, with all that they are compared with, e.g. "students/kd"
            forms=("noise", "swap", "lens", "gradient"),  # noise: MoPe and per block
            roles=("private", "heldout"),
            examples=1000,  # a role, the first by seeded hash; 0 = all
            draws=10,  # of noise, the same for all examples and all blocks
            sigma=0.01,  # of the noise on every weight
            relative_sigma=0.05,  # of the noise on a block, over the root mean square of its weights
            batch_rows=8,  # packed rows a pass
        )
    )
    config.shadow = ConfigDict(  # chains teacher -> student on random halves of private and heldout: LiRA, RMIA
        dict(
            design="none",  # none | full | cheap (one pair of teachers, many students) | two_by_two
            chains=16,  # full: even; two_by_two: a multiple of 4; cheap: 2 teachers with so many students in all
            records=0,  # of private and heldout, by seeded hash; 0 = all
            student="students/kd",  # the run that each chain repeats, its teacher with it
            way="auto",  # how chains run: auto | loop | map | vmap
        )
    )
    config.attack = ConfigDict(
        dict(
            primary="loss",  # named beforehand; all others are secondary
            headline="students/kd",  # run whose leak the report's first sentence states
            references=("base_student", "base_teacher", "null"),
            role_pair="private-heldout",  # of the headline; or averaged, where its run has a swap
            bootstrap=1000,  # resamples of TPR intervals
        )
    )
    config.plan = ConfigDict(dataclasses.asdict(Stated()))  # what --stages=plan cannot find out
    config.report = ConfigDict(dict(show_canaries=False))  # print invented canaries; never for private records
    return config


def standard_runs(
    teacher: str = "matched",
    student: str = "matched",
    kd: str = "matched",
    *,
    techniques: tuple[str, ...] = ("kd",),
    swapped: tuple[str, ...] = ("kd",),
    shared: tuple[str, ...] = ("kd",),
    init: str = "",
    seeds: tuple[int, ...] = (0,),
) -> ConfigDict:
    """The graph every table needs: bases, teacher, its counterfactual, the controls, students of each setting.

    Args:
        teacher, student, kd: recipes of the teachers, of the students without a teacher, and of the distilled ones.
        techniques: of the `disjoint` students.
        swapped: those of them with a counterfactual, taught by `swap`.
        shared: techniques of students distilled on the teacher's own data.
        init: recipe of an SFT on the public role that students start from; "" = from the raw base.
    """
    big = {"model": "teacher", "technique": "sft", "init": "base_teacher", "recipe": teacher, "seeds": seeds}
    small = {"model": "student", "init": "init_student" if init else "base_student", "seeds": seeds}
    control = {**small, "technique": "sft", "recipe": student}
    public, private = {"train_roles": ("public",)}, {"train_roles": ("private",)}

    def students(folder: str, names: tuple[str, ...], ending: str = "", **keys) -> dict[str, ConfigDict]:
        distilled = {**small, "recipe": kd, **keys}
        return {f"{folder}/{name}{ending}": run(**distilled, technique=name) for name in names}

    runs = {"base_teacher": run("teacher", seeds=seeds), "base_student": run("student", seeds=seeds)}
    if init:
        sft = {**control, "init": "base_student", "recipe": init}
        runs["init_student"] = run(**sft, **public)
    runs |= {"teacher": run(**big, **private), "null": run(**control, **public)}
    runs |= students("students", techniques, teacher="teacher", setting="disjoint", **public)
    runs |= {"direct": run(**control, **private), "swap": run(**big, train_roles=("heldout",), swap_of="teacher")}
    counterfactual = students("swap_students", swapped, teacher="swap", setting="disjoint", **public)
    for name, entry in counterfactual.items():
        entry.swap_of = name.removeprefix("swap_")
    runs |= counterfactual
    runs |= students("students", shared, "_shared", teacher="teacher", setting="shared", **private)
    return ConfigDict(runs)
