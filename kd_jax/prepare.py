"""From a config to encoded records with roles: everything that happens before the first model is touched."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
import tempfile

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from kd_jax import excluded, manifest, processes, storage
from kd_jax.data import encode, records, roles, synthetic, token_ids, tokenizer
from kd_jax.errors import ConfigError
from kd_jax.storage import Path


@dataclasses.dataclass(frozen=True)
class Data:
    """Records of one study. `encoded` holds every record and canary, `splits` says which role each has.

    excluded: ids that no run is trained on (`data.exclude`).
    """

    frame: pd.DataFrame
    splits: pd.DataFrame
    tokenizer: tokenizer.Tokenizer
    encoded: encode.Encoded
    counts: dict[str, int]
    excluded: frozenset[str] = frozenset()

    @functools.cached_property
    def ids(self) -> set[str]:
        """Of all records, and of the windows that plain texts are cut into."""
        return {*self.splits.example_id, *self.encoded.example_id}

    def of_role(self, role: str) -> encode.Encoded:
        return self.encoded.select(self.splits.example_id[self.splits.role == role])

    def of_run(self, train_roles: tuple[str, ...]) -> encode.Encoded:
        """What a run trains on: its roles, its half of `calib`, and the canaries that its roles carry, repeated."""
        wanted = roles.training_ids(self.splits, train_roles)
        return self.encoded.select(np.repeat(wanted.example_id.to_numpy(), wanted.repeats.to_numpy()))

    def encoded_by(self, tok: tokenizer.Tokenizer, config: ConfigDict, **changes) -> Data:
        """The same records in the tokens of another tokenizer; changes: of the config's settings of encoding."""
        encoded = encode.encode(self.frame, tok, **(_encoding(config) | changes))
        return dataclasses.replace(self, tokenizer=tok, encoded=encoded)

    def fingerprints(self) -> dict[str, str]:
        return {
            "data": self.encoded.fingerprint(),
            "tokenizer": self.tokenizer.fingerprint,
            "splits": splits_fingerprint(self.splits),
        }


def prepare(config: ConfigDict, workdir: Path) -> Data:
    """Load or invent records, draw roles and canaries, get the tokenizer, encode. Raises DataError before any training.

    Writes `splits.parquet` and `tokenizer/` under `workdir`, and refuses a workdir whose splits are other ones.
    """
    if "prefix" in config:  # token ids: configs/extraction.py
        return _given_ids(config, workdir)
    foreign = "members" in config  # checkpoints trained elsewhere: configs/audit.py
    frame, drawn, counts = _two_files(config, workdir) if foreign else _load(config)
    canaries, rows = _canaries(config, frame)
    splits = pd.concat([drawn, rows], ignore_index=True)
    _keep(splits, workdir / "splits.parquet")
    everything = pd.concat([frame, canaries], ignore_index=True)
    public = everything[everything.example_id.isin(splits.example_id[splits.role == "public"])]
    tok = _tokenizer(config, public, workdir)
    encoded = encode.encode(everything, tok, **_encoding(config))
    if rows is not None and np.isin(encoded.record_id, rows.example_id.to_numpy(object)).sum() > len(rows):
        raise ConfigError(f"data.max_length {config.data.max_length} cuts canaries in two: they need about 60 tokens")
    counts |= {k: v for k, v in encoded.counts.items() if v}
    left = splits[splits.example_id.isin(encoded.record_id)]
    least = {"private": config.data.minimum, "heldout": config.data.minimum}
    if foreign:
        _check_files(config, left, least)
    else:
        least |= {"public": 1, "dev": 1}
        if "calib" in config.score.roles:
            least["calib"] = config.data.minimum // 5
        roles.check(left, least)
    counts |= {f"role {r}": int(n) for r, n in left.role.value_counts().sort_index().items()}
    if config.data.synthetic.records:
        source = everything.set_index("example_id").source
        private, public = (set(source[left.example_id[left.role == role]]) for role in ("private", "public"))
        counts["private records whose entity a public prompt touches"] = len(private & public)
    data = Data(everything, splits, tok, encoded, counts)
    if left_out := excluded.of_config(config.data.exclude, data.ids):
        counts["never trained on (data.exclude)"] = len(left_out)
    return dataclasses.replace(data, excluded=left_out)


def plain_text(config: ConfigDict, tok: tokenizer.Tokenizer, name: str) -> encode.Encoded:
    """Plain text in windows of `data.max_length` tokens: `pretrain` for base runs, `lm` for a language-model term."""
    source = config.data[name]
    if not source.path:
        why = {"pretrain": "a base is to be pre-trained", "lm": "an objective's lm_coef is above 0"}[name]
        raise ConfigError(f"{why}, but data.{name}.path is empty")
    frame = records.load(source.path, text_unit=source.text_unit, limit=source.limit or None, seed=config.seed)
    return encode.encode(frame, tok, **(_encoding(config) | {"template": "text"}))


def _encoding(config: ConfigDict) -> dict:
    keys = ("template", "bos", "max_length", "max_prompt", "long_prompt", "joint")
    return {k: config.data[k] for k in keys}


def _load(config: ConfigDict) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Records of the one source that the config names, the roles that they drew, and counts."""
    data = config.data
    sources = {"data.path": data.path, "data.dataset": data.dataset, "data.synthetic.records": data.synthetic.records}
    if sum(map(bool, sources.values())) != 1:
        raise ConfigError(f"exactly one of {', '.join(sources)} must be set, not {sources}")
    if data.synthetic.records:
        frame = synthetic.generate(data.synthetic.records, overlap=data.synthetic.overlap, seed=config.seed)
        frame, counts = _used(config, frame)
    else:
        frame, counts = _read(config, data.path, data.dataset)
    drawn = roles.assign(frame, dict(data.roles), config.seed, data.repeated.share, tuple(data.repeated.times))
    if data.repeated.share:
        counts["trained on repeatedly (data.repeated)"] = int((drawn.repeats > 1).sum())
    return frame, drawn, counts


def _two_files(config: ConfigDict, workdir: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Members and non-members of a model that was trained elsewhere: what `_load` returns, roles by file."""
    if not 0 <= config.calib_share < 0.9:
        raise ConfigError(f"calib_share is {config.calib_share:g}; it must lie in [0, 0.9)")
    frames, counts = {}, {}
    for name in ("members", "nonmembers"):
        frames[name], read = _read(config, config[name])
        stem = pathlib.Path(config[name]).name.split(".")[0]  # the task of a record that has none: it would tell all
        frames[name]["task"] = frames[name].task.where(frames[name].task != stem, "all")
        counts |= {f"{name}: {what}": number for what, number in read.items()}
    splits = roles.by_file(frames["members"], frames["nonmembers"], config.calib_share, config.seed)
    inputs = {name: manifest.digest(sorted(frame.example_id)) for name, frame in frames.items()}
    folder = workdir / "records"
    if not manifest.finished(folder, inputs | {"calib_share": config.calib_share, "seed": config.seed}, "the split"):
        manifest.write(folder, inputs | {"calib_share": config.calib_share, "seed": config.seed}, counts)
    return pd.concat(frames.values(), ignore_index=True), splits, counts


def _given_ids(config: ConfigDict, workdir: Path) -> Data:
    """Texts that are given as token ids, all of them members."""
    if config.tokenizer.train_size:
        raise ConfigError("tokenizer.train_size: the ids of config.prefix are those of a tokenizer that is there")
    prefixes, suffixes = token_ids.pair(config.prefix, config.suffix)
    tok = _tokenizer(config, pd.DataFrame(), workdir)
    encoded = token_ids.encode(prefixes, suffixes, tok, config.data.bos)
    if (longest := int(encoded.lengths.max())) > config.data.max_length:
        raise ConfigError(
            f"data.max_length is {config.data.max_length}, but a prefix and a suffix have {longest} tokens"
        )
    groups = token_ids.content(encoded.example_id)
    frame = pd.DataFrame({"example_id": encoded.example_id, "group": groups, "task": encoded.task})
    frame["response"] = tok.decode_batch(np.split(encoded.tokens, encoded.offsets[1:-1]))
    frame = frame.reindex(columns=list(records.COLUMNS))
    splits = roles.by_file(frame, frame.iloc[:0], 0, config.seed)
    _keep(splits, workdir / "splits.parquet")
    counts = {"texts": len(frame), "distinct texts": len(set(groups)), "role private": len(frame)}
    return Data(frame, splits, tok, encoded, counts)


def _check_files(config: ConfigDict, left: pd.DataFrame, least: dict[str, int]) -> None:
    counts = left.role.value_counts()
    for name, role in (("members", "private"), ("nonmembers", "heldout")):
        if (n := counts.get(role, 0)) < least[role]:
            raise roles.DataError(
                f"{config[name]}: {n} records are left to evaluate (data.minimum: {least[role]}) after duplicates, "
                f"data.max_chars, data.limit and calib_share {config.calib_share:g}; give more {name}"
            )


def _read(config: ConfigDict, path: str, dataset: str = "") -> tuple[pd.DataFrame, dict[str, int]]:
    data = config.data
    frame = records.load(
        path or None,
        dataset=dataset or None,
        split=data.split,
        format=data.format,
        text_unit=data.text_unit,
        group_key=data.group_key or None,
        fields={ours: theirs for ours, theirs in data.fields.items() if theirs},
        seed=config.seed,
    )
    return _used(config, frame)


def _used(config: ConfigDict, frame: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, int]]:
    """Those records that `data.max_chars`, `data.exclude_tasks` and `data.limit` leave, and counts."""
    data = config.data
    if min(data.limit, data.max_chars, data.pretrain.limit, data.lm.limit) < 0:
        raise ConfigError("data.limit, data.max_chars, data.pretrain.limit and data.lm.limit must not be negative")
    counts = {"records read": len(frame), "duplicates removed": int(frame.attrs.get("duplicates", 0))}
    size = sum(frame[c].fillna("").str.len() for c in ("instruction", "input", "response"))
    keep = ~frame.task.isin(data.exclude_tasks) & ((size <= data.max_chars) if data.max_chars else True)
    counts["longer than data.max_chars or of an excluded task"] = int((~keep).sum())
    frame = frame[keep]
    if data.limit and len(frame) > data.limit:  # by seeded hash, never by order
        rank = [hashlib.sha256(f"{config.seed}:{i}".encode()).digest() for i in frame.example_id]
        frame = frame.iloc[sorted(sorted(range(len(frame)), key=rank.__getitem__)[: data.limit])]
    counts["records used"] = len(frame)
    return frame.reset_index(drop=True), counts


def _canaries(config: ConfigDict, frame: pd.DataFrame) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Canaries that are read as the records are: plain texts among plain texts."""
    settings = config.data.canaries
    if not settings.per_cell:
        return None, None
    text = _plain(frame, config.data.template)
    return roles.make_canaries(settings.per_cell, repeats=tuple(settings.repeats), seed=config.seed, text=text)


def _plain(frame: pd.DataFrame, template: str) -> bool:
    """Is every record read as one plain text?"""
    if template not in encode.TEMPLATES:
        raise ConfigError(f"data.template is {template!r}; known are {', '.join(encode.TEMPLATES)}")
    return encode.TEMPLATES[template] is None or bool(frame.instruction.isna().all())


def _tokenizer(config: ConfigDict, public: pd.DataFrame, workdir: Path) -> tokenizer.Tokenizer:
    spec = config.tokenizer.to_dict()
    if not spec["train_size"]:
        if not any(spec[k] for k in ("path", "vocab", "json")):
            spec["path"] = config.models.teacher.path  # the models bring their own
            spec["revision"] = config.models.teacher.revision
        return tokenizer.load(spec)
    folder, texts = workdir / "tokenizer", _texts(public, config.data.template)
    inputs = {"tokenizer": spec, "texts": hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]}
    if not processes.agree(manifest.finished(folder, inputs, "the tokenizer")):
        fingerprint = ""
        if processes.first():
            trained = tokenizer.load(spec, train_texts=texts)
            with tempfile.TemporaryDirectory() as place:
                trained.save(place)
                for file in pathlib.Path(place).iterdir():  # whole or not at all: other programs may be reading it
                    storage.write_bytes(folder / file.name, file.read_bytes())
            fingerprint = trained.fingerprint
        manifest.write(folder, inputs, {"fingerprint": fingerprint})
    with storage.local_copy(folder) as place:
        return tokenizer.load({"json": str(place / "tokenizer.json")})


def _texts(frame: pd.DataFrame, template: str) -> list[str]:
    """Records as a model reads them, for training a tokenizer."""
    if _plain(frame, template):
        return frame.response.tolist()
    forms = encode.TEMPLATES[template]
    return [
        forms[bool(row.input)].format(instruction=row.instruction, input=row.input) + row.response
        for row in frame.itertuples()
    ]


def splits_fingerprint(splits: pd.DataFrame) -> str:
    """First 16 hex of the sha256 of the splits table, whatever its row order."""
    rows = splits.sort_values("example_id").reset_index(drop=True)
    return hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()[:16]


def _keep(splits: pd.DataFrame, path: Path) -> None:
    """Write the splits once; a later start must draw the same ones."""
    if processes.agree(path.exists()):
        if not storage.whole(path):
            raise roles.DataError(f"{path} is damaged: delete it, and the same roles are drawn again")
        if splits_fingerprint(pd.read_parquet(storage.readable(path))) != splits_fingerprint(splits):
            raise roles.DataError(
                f"{path} holds other roles than this config draws (data, seed or shares changed): use another --workdir"
            )
        return
    processes.once(lambda: storage.write_bytes(path, splits.to_parquet(index=False)), "splits")


def write_text_tables(data: Data, folder: Path) -> None:
    """What text-only classifiers need: `<role>.parquet`, `splits.parquet`; of a public role `token_counts.npz`.

    Written anew by every start, without asking what is there.
    """
    for role in sorted(set(data.splits.role) - {"public"}):
        encoded = data.of_role(role)
        if len(encoded):
            table = encode.text_table(encoded, data.frame, data.tokenizer)
            storage.write_bytes(folder / f"{role}.parquet", table.to_parquet(index=False))
    storage.write_bytes(folder / "splits.parquet", data.splits.to_parquet(index=False))
    if len(public := data.of_role("public")):
        with storage.create(folder / "token_counts.npz") as handle:
            np.savez(handle, counts=encode.token_counts(public, data.tokenizer.vocab_size))
    storage.write_text(folder / "counts.json", json.dumps(data.counts, indent=1))
