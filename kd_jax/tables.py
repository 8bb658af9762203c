"""The score stage: every table that the audit reads, each written once under the work directory.

scores/<run>/seed<k>/plain/          score tables of a run, and manifest.json; ledger.parquet beside them
scores/<run>/seed<k>/<variant>/      the same of other texts (`kd_jax/variants.py`), or of a checkpoint (step-<n>)
scores/<run>/seed<k>/continued/      what it generates after prompts and first tokens (`kd_jax/continued.py`)
scores/<run>/seed<k>/whitebox/       what its weights show of some examples (`kd_jax/whitebox/table.py`)
scores/<run>/seed<k>/generated/      ROUGE of the run's answers, per example
scores/pairs/<a>__<b>/seed<k>/       a teacher and its student, token by token
scores/text/                         what text-only classifiers need
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging

import jax
import numpy as np

from kd_jax import (
    checkpoint,
    continued,
    foreign,
    manifest,
    pairs,
    prepare,
    processes,
    storage,
    utility,
    variants,
    windows,
)
from kd_jax import score as scoring
from kd_jax.data import encode
from kd_jax.data.encode import Encoded
from kd_jax.errors import ConfigError
from kd_jax.graph import Run
from kd_jax.metrics import progress
from kd_jax.study import (
    Study,
    answer_set,
    code_version,
    continuing_spec,
    load_run,
    model_config,
    objective_of,
    recipe_of,
    sampling_spec,
    scoring_spec,
    whitebox_spec,
    windows_spec,
)
from kd_jax.transformer import Transformer
from kd_jax.whitebox import table as whitebox

log = logging.getLogger(__name__)

# Facts of a run's manifest that its score tables carry on to the audit.
TRAINING = (
    *("lr", "grid", "lr_from", "select", "selected_step", "steps", "response_tokens", "sources"),
    *("branches", "phi", "warnings", "fidelity"),
)
TRAINED_ELSEWHERE = "trained elsewhere, and nothing here can check on what: the two files say who is a member."
GIVEN_IDS = "trained elsewhere, and nothing here can check on what: it is taken to have seen the texts."


def score_runs(study: Study) -> None:
    """Score every run on every scored role, and write the text tables."""
    if processes.first():
        prepare.write_text_tables(study.data, study.workdir / "scores" / "text")
    s = study.config.score
    couples = pairs.chosen(tuple(s.pairs), study.runs)
    if crossed := [f"{a}:{b}" for a, b in couples if {study.runs[a].model, study.runs[b].model} & set(study.own_data)]:
        raise ConfigError(f"score.pairs: the models of {', '.join(crossed)} have different tokenizers")
    ready, looked_into = study.ready(), whitebox.chosen(study.config, study.runs)
    for run, seed in ready:
        own = study.of(run)
        roles = _roles(own)
        for variant in ("plain", *_fitting(own, run)):
            _score(own, run, seed, roles, variant)
        for step in _kept(study, run, seed):
            _score(own, run, seed, roles, f"step-{step}")
        if windows_spec(own):
            _score(own, run, seed, {r: e for r, e in roles.items() if r in windows.ROLES}, "windows")
        if continuing_spec(own).examples:
            _continue(own, run, seed, {r: e for r, e in roles.items() if r in continued.ROLES})
        if run.name in looked_into:
            _look_into(own, run, seed)
        if study.config.utility.seeds:
            _answer(study, run, seed)
    names = {run.name for run, _ in ready}
    for a, b in couples:
        for seed in study.runs[b].seeds if b in names and (a in names or study.only) else ():
            _score_pair(study, study.runs[a], study.runs[b], seed, _roles(study))
    if study.config.report.show_canaries and not study.only:
        _show_canaries(study, names)
    manifest.write(study.workdir / "scores" / "text", {}, {})  # checksums alone: every start writes these files


def _roles(study: Study) -> dict[str, Encoded]:
    """The examples of every scored role that has some."""
    found = {role: study.data.of_role(role) for role in study.config.score.roles}
    return {role: encoded for role, encoded in found.items() if len(encoded)}


def _fitting(study: Study, run: Run) -> list[str]:
    """The variants of the texts; of a checkpoint trained elsewhere, those that its context has room for."""
    wanted = list(study.config.score.variants)
    if not foreign.elsewhere(study.config):
        return wanted
    positions = model_config(study, run.model).max_positions
    settings = dict(seed=study.config.seed, max_positions=positions)
    found = [name for name in wanted if variants.fits(name, study.data, **settings)]
    if left := sorted(set(wanted) - set(found)):
        log.info("%s: no %s: a context of %d tokens has no room for a prefix", run.name, ", ".join(left), positions)
    return found


def _trained(study: Study, run: Run, seed: int) -> tuple[dict | None, object]:
    """A run's manifest (None for a base as loaded), and what identifies its parameters."""
    trained = manifest.read(study.folder(run, seed)) if run.train_roles else None
    base = study.config.models[run.model]
    loaded = base.to_dict() | {"files": manifest.stamp(base.path)}
    return trained, trained["facts"]["params_fingerprint"] if trained else loaded


def _kept(study: Study, run: Run, seed: int) -> list[int]:
    """Steps of a run whose parameters were kept for scoring."""
    trained, _ = _trained(study, run, seed)
    return trained["facts"]["trajectory"] if trained and study.config.score.trajectory else []


def _inputs(study: Study, roles: dict[str, Encoded], **own) -> dict:
    scored = dict(scoring=dataclasses.asdict(scoring_spec(study)), roles=sorted(roles), seed=study.config.seed)
    return own | scored | study.data.fingerprints()


def _score(study: Study, run: Run, seed: int, roles: dict[str, Encoded], variant: str) -> None:
    """Score tables of a run: `plain`, a variant of the texts, or `step-<n>`, of an earlier checkpoint."""
    folder = study.folder(run, seed, "scores") / variant
    trained, source = _trained(study, run, seed)
    what = f"{run.name} seed {seed}" + ("" if variant == "plain" else f", {variant}")
    if trained and variant == "plain":
        _copy_ledger(study.folder(run, seed), trained, folder.parent)
    other_half = variant.startswith("recall") and _trained_on_heldout(study, run)
    cut = windows_spec(study) if variant == "windows" else None
    own = ({"other_half": True} if other_half else {}) | ({"windows": dataclasses.asdict(cut)} if cut else {})
    inputs = _inputs(study, roles, model=source, **own)
    if manifest.begin(folder, inputs, f"scores of {what}"):
        log.info("%s: scored before", what)
        return
    kept = study.folder(run, seed) / "trajectory" / variant if variant.startswith("step-") else None
    model, spec = load_run(study, run.name, seed, kept), scoring_spec(study)
    facts = dict(params_fingerprint=checkpoint.fingerprint(model), code_version=code_version())
    metadata = _metadata(study, run, seed, model, facts, trained, spec) | {"variant": variant}
    if kept:
        metadata["step"] = variant.removeprefix("step-")
    with progress(sum(map(len, roles.values())), f"score {what}", unit="example") as bar:
        for role, encoded in roles.items():
            if variant != "plain" and not kept:
                plain = len(encoded)
                if cut:
                    encoded, facts[role] = windows.build(study.data, encoded, cut)
                else:
                    settings = dict(seed=study.config.seed, max_positions=model.cfg.max_positions, swapped=other_half)
                    encoded, facts[role] = variants.build(variant, study.data, encoded, **settings)
                bar.total += len(encoded) - plain
                spec = dataclasses.replace(spec, row_length=max(spec.row_length, int(encoded.lengths.max())))
            scoring.score_role(model, encoded, role, folder, spec, study.mesh, metadata, bar)
    manifest.end(folder, inputs, facts)


def _copy_ledger(source: storage.Path, trained: dict, target: storage.Path) -> None:
    """A run's ledger, as its manifest says it is, beside its score tables, with a checksum of its own."""
    name, kept = "ledger.parquet", manifest.intact(target)
    if processes.agree(bool(kept) and storage.digests(source, [name]) == kept["files"]):
        return
    manifest.check(source, manifest.digest(trained))

    def work() -> None:
        storage.copy(source / name, target / name)

    processes.once(work, f"ledger of {source}")
    manifest.write(target, {}, {})


def _continue(study: Study, run: Run, seed: int, roles: dict[str, Encoded]) -> None:
    """What a run generates after the prefixes of some examples, beside what its plain score tables say."""
    folder, spec = study.folder(run, seed, "scores") / "continued", continuing_spec(study)
    trained, source = _trained(study, run, seed)
    inputs = _inputs(study, roles, model=source, continuing=dataclasses.asdict(spec))
    if manifest.begin(folder, inputs, f"continuations of {run.name} seed {seed}"):
        return
    model = load_run(study, run.name, seed)
    facts = dict(params_fingerprint=checkpoint.fingerprint(model), code_version=code_version())
    metadata = _metadata(study, run, seed, model, facts, trained, scoring_spec(study)) | {"variant": "continued"}
    generator = dict(vocab=study.vocab, eos_id=study.data.tokenizer.eos_id, mesh=study.mesh)
    with progress(0, f"continue {run.name} seed {seed}", unit="example") as bar:
        for role, encoded in roles.items():
            place = (folder.parent / "plain", folder, spec)
            facts[role] = continued.continue_role(model, encoded, role, *place, **generator, metadata=metadata, bar=bar)
    manifest.end(folder, inputs, facts)


def _look_into(study: Study, run: Run, seed: int) -> None:
    """White-box tables of a run, beside the base that it began with. Other settings make these tables anew."""
    folder, spec, w = study.folder(run, seed, "scores") / "whitebox", whitebox_spec(study), study.config.whitebox
    base, base_seed = whitebox.base_of(study.runs, run.name, seed)
    swapped = "swap" in spec.forms and base != run.name
    trained, source = _trained(study, run, seed)
    inputs = dict(model=source, seed=study.config.seed, **study.data.fingerprints())
    inputs["whitebox"] = dataclasses.asdict(spec) | dict(roles=sorted(w.roles), examples=w.examples)
    if swapped:
        inputs["base"] = _trained(study, study.runs[base], base_seed)[1]
    _drop_other_settings(folder, inputs["whitebox"])
    if manifest.begin(folder, inputs, f"white-box tables of {run.name} seed {seed}"):
        log.info("%s seed %d, white-box: done before", run.name, seed)
        return
    model = load_run(study, run.name, seed)
    other = load_run(study, base, base_seed) if swapped else None
    facts = dict(params_fingerprint=checkpoint.fingerprint(model), code_version=code_version())
    plain = _metadata(study, run, seed, model, facts, trained, scoring_spec(study))
    metadata = whitebox.describe(plain, spec, model, base if base != run.name else "")
    roles = {r: whitebox.examples(study.data.of_role(r), w.examples, study.config.seed) for r in w.roles}
    with progress(sum(map(len, roles.values())), f"weights of {run.name} seed {seed}", unit="example") as bar:
        for role, encoded in roles.items():
            whitebox.whitebox_role(model, other, encoded, role, folder, spec, study.mesh, metadata, bar)
    manifest.end(folder, inputs, facts)


def _drop_other_settings(folder: storage.Path, settings: dict) -> None:
    """Delete white-box tables that were made or begun with other settings; other models are refused as everywhere."""

    def work() -> None:
        for place in (folder, folder / manifest.BEGUN):
            with contextlib.suppress(manifest.Damaged):  # `begin` deals with it
                found = manifest.read(place)
                if found and manifest.digest(found["inputs"].get("whitebox")) != manifest.digest(settings):
                    log.info("%s: made with other settings, and made anew", folder)
                    storage.rmtree(folder)

    processes.once(work, f"white-box settings of {folder}")


def _trained_on_heldout(study: Study, run: Run) -> bool:
    """Are a run's members those of the swap, so that the halves of `calib` change sides?"""
    return "heldout" in {*run.train_roles, *(study.runs[run.teacher].train_roles if run.teacher else ())}


def _score_pair(study: Study, a: Run, b: Run, seed: int, roles: dict[str, Encoded]) -> None:
    """Compare run a (the teacher) and run b (the student) on every role."""
    seed_a, spec = a.seed_for(seed), scoring_spec(study)
    folder = pairs.folder_of(study.workdir / "scores", a.name, b.name, seed)
    temperature = objective_of(study.config, b).student_T
    trained, source = _trained(study, b, seed)
    inputs = _inputs(study, roles, models=[_trained(study, a, seed_a)[1], source], temperature=temperature)
    if manifest.begin(folder, inputs, f"pair {a.name} and {b.name} seed {seed}"):
        return
    models = load_run(study, a.name, seed_a), load_run(study, b.name, seed)
    facts = dict(params_fingerprint=checkpoint.fingerprint(models[1]), code_version=code_version())
    plain = _metadata(study, b, seed, models[1], facts, trained, spec)
    metadata = pairs.describe(plain, a.name, seed_a, temperature)
    with progress(sum(map(len, roles.values())), f"pair {a.name} {b.name} seed {seed}", unit="example") as bar:
        for role, encoded in roles.items():
            place = (folder, spec, study.mesh, metadata, bar)
            pairs.score_pair_role(*models, encoded, role, *place, temperature=temperature)
    manifest.end(folder, inputs, facts)


def _answer(study: Study, run: Run, seed: int) -> None:
    """ROUGE of a run's answers on every set that `config.utility` names."""
    folder, u = study.folder(run, seed, "scores") / "generated", study.config.utility
    trained, source = _trained(study, run, seed)
    inputs = dict(model=source, utility=u.to_dict(), seed=study.config.seed, **study.data.fingerprints())
    inputs["files"] = {name: manifest.stamp(path) for name, path in u.files.items()}
    if manifest.begin(folder, inputs, f"answers of {run.name} seed {seed}"):
        return
    model = load_run(study, run.name, seed)
    facts = dict(params_fingerprint=checkpoint.fingerprint(model), code_version=code_version())
    metadata = _metadata(study, run, seed, model, facts, trained, scoring_spec(study))
    sets = [*u.roles, *u.files]
    with progress(len(sets), f"answer {run.name} seed{seed}", unit="set") as bar:
        for name in sets:
            found = answer_set(study, model, name, seeds=tuple(u.seeds), limit=u.examples)
            facts[name] = utility.means(found) | {"near_ties": found.attrs["near_ties"]}
            if processes.first():
                utility.write(found, folder / f"{name}.parquet", metadata)
            bar.update()
    manifest.end(folder, inputs, facts | {"sampling": dataclasses.asdict(sampling_spec(study))})


def _metadata(study: Study, run: Run, seed: int, model: Transformer, facts: dict, trained: dict | None, spec):
    """Parquet metadata: what the table is, so that no program parses paths."""
    provenance = dict(
        technique=run.technique,
        setting=run.setting,
        train_roles=list(run.train_roles),
        teacher=run.teacher or None,
        init=run.init or None,
        recipe=recipe_of(study.config, run).name if run.recipe else None,
        swap_of=run.swap_of or None,
        exclude=run.exclude or None,
        n_params=sum(int(x.size) for x in jax.tree.leaves(model)),
        tokenizer_fingerprint=study.data.tokenizer.fingerprint,
        splits_fingerprint=prepare.splits_fingerprint(study.data.splits),
        dtype="float32",
        matmul_precision=spec.precision,
        bos=study.config.data.bos,
        **facts,
    )
    if trained:
        provenance["objective"] = objective_of(study.config, run).distinctive()
        provenance["excluded"] = trained["facts"].get("excluded", 0)
        provenance["excluded_exposures"] = trained["facts"].get("excluded_exposures")
        provenance["training"] = {k: trained["facts"][k] for k in TRAINING if k in trained["facts"]}
    elif run.name == study.config.attack.headline and foreign.elsewhere(study.config):
        provenance["training"] = {"warnings": [GIVEN_IDS if foreign.by_ids(study.config) else TRAINED_ELSEWHERE]}
    step = trained["facts"]["step"] if trained else 0
    known = dict(run=run.name, seed=seed, split_seed=study.config.seed, step=step, variant="plain")
    return {k: str(v) for k, v in known.items()} | {"provenance": json.dumps(provenance)}


def _show_canaries(study: Study, ready: set[str]) -> None:
    """What models make of the invented canaries that went to the teacher alone; the report chooses which it prints.

    The guess is each model's most probable token at every position of the true response (teacher-forced).
    """
    splits = study.data.splits
    inserted = splits[(splits.role == "canary") & (splits.coin == 1) & (splits.placement == "teacher_only")]
    if inserted.empty:
        return
    encoded = study.data.encoded.select(inserted.example_id)
    frame = study.data.frame.set_index("example_id")
    rows = [
        dict(
            example_id=r.example_id,
            prompt=frame.instruction[r.example_id] or "",  # a plain text has none
            response=frame.response[r.example_id],
            repeats=int(r.repeats),
            placement=r.placement,
            coin=int(r.coin),
            models={},
        )
        for r in inserted.itertuples()
    ]
    for name in ("teacher", study.config.attack.headline, "null"):
        if name not in ready:
            continue
        model = load_run(study, name, study.runs[name].seeds[0])
        counts, fields = scoring.score(model, encoded, np.arange(len(rows)), scoring_spec(study), study.mesh)
        ends = np.cumsum(counts)
        for row, start, end in zip(rows, ends - counts, ends):
            response = fields["segment"][start:end] == encode.RESPONSE
            guess = study.data.tokenizer.decode(fields["top1_id"][start:end][response].tolist())
            row["models"][name] = dict(guess=guess, mean_logp=float(fields["logp"][start:end].mean()))
    if processes.first():
        storage.write_text(study.workdir / "scores" / "text" / "canaries.json", json.dumps(rows, indent=1))
