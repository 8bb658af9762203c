"""Checkpoints trained elsewhere (`configs/audit.py`, `configs/extraction.py`): the rest of their config, and tokenizers
of their own.
"""

from __future__ import annotations

import logging
import pathlib

import numpy as np
from ml_collections import ConfigDict

from kd_jax import hf, prepare, processes, storage
from kd_jax.data import tokenizer
from kd_jax.data.records import DataError
from kd_jax.errors import ConfigError

log = logging.getLogger(__name__)

MAX_LENGTH = 512  # tokens, where the models take as many
BEGIN_WITH_BOS = ("llama", "opt")  # families that are pre-trained so
OWN_FILES = ("tokenizer.json", "vocab.json")


def elsewhere(config: ConfigDict) -> bool:
    """Were the config's checkpoints trained elsewhere?"""
    return "student" in config


def by_ids(config: ConfigDict) -> bool:
    """Are its texts given as token ids?"""
    return "prefix" in config


def complete(config: ConfigDict) -> ConfigDict:
    """An audit's config with all that follows from its checkpoints filled in; any other config as it is.

    Runs without a checkpoint leave; the tokenizer, its BOS policy and `data.max_length` are those of the models unless
    they are set. Raises ConfigError on keys that are not set, CheckpointError on folders that cannot be read.
    """
    if not elsewhere(config):
        return config
    config = config.copy_and_resolve_references()
    files = ("prefix", "suffix") if by_ids(config) else ("members", "nonmembers")
    if absent := [f"--config.{key}=..." for key in ("student", *files) if not config[key]]:
        where = "configs/extraction.py" if by_ids(config) else "configs/audit.py"
        raise ConfigError(f"an audit of checkpoints needs {', '.join(absent)}; see {where}")
    with config.unlocked():
        for name in ("student", "teacher", "reference"):
            if config[name]:
                config.models[name].path = config[name]
            elif name in config.models:
                del config.models[name], config.runs[name]
        if not any(config.tokenizer[key] for key in ("path", "vocab", "json", "train_size")):
            config.tokenizer.path, config.tokenizer.revision = config.student, config.models.student.revision
    data = config.data
    if data.bos == "family":
        data.bos = _bos(config, "student")
    if not data.max_length:
        data.max_length = min(MAX_LENGTH, *(_positions(config, name) for name in config.models))
    data.max_prompt = data.max_prompt or data.max_length // 2
    return config


def check(config: ConfigDict, workdir: storage.Path) -> None:
    """Are all checkpoints whole?  Raises CheckpointError; ConfigError where a model is gone whose scores remain."""
    for model in config.models.values():
        hf.check_pretrained(model.path, revision=model.revision or None)
    for name in ("teacher", "reference"):
        scores = workdir / "scores" / name
        if name not in config.models and processes.agree(scores.exists()):
            raise ConfigError(
                f"{scores} is left from an audit with a {name}: name it again, use another --workdir, or delete this "
                "folder"
            )


def _bos(config: ConfigDict, name: str) -> str:
    model = config.models[name]
    return "bos" if hf.read_family(model.path, revision=model.revision or None) in BEGIN_WITH_BOS else "none"


def _positions(config: ConfigDict, name: str) -> int:
    model = config.models[name]
    return hf.read_config(model.path, revision=model.revision or None).max_positions


def own_data(config: ConfigDict, data: prepare.Data) -> dict[str, prepare.Data]:
    """Of every model whose tokenizer cuts the records otherwise than the student's, the records as it reads them.

    Such a model begins a text as its family does, whatever `data.bos` says of the student.
    Raises ConfigError where the student's own tokenizer is another one than the config names, or where texts are given
    as ids that a model reads as other text.
    """
    found = {}
    for name, model in config.models.items():
        own = _tokenizer(model)
        if own is None or own.fingerprint == data.tokenizer.fingerprint:
            continue
        if by_ids(config):
            _insist_on_same_text(name, own, data)
            continue
        if name == "student":
            _insist_on_same(data.tokenizer, own)
        same_size = own.vocab_size == data.tokenizer.vocab_size
        if same_size and data.encoded_by(own, config).encoded.fingerprint() == data.encoded.fingerprint():
            continue  # they name their special tokens otherwise: nothing that a record holds
        found[name] = data.encoded_by(own, config, bos=_bos(config, name))
        log.info("%s has a tokenizer of its own: attacks that compare it token by token are left out", name)
    return found


def note_cuts(data: prepare.Data, config: ConfigDict) -> None:
    """Log how many texts are not read in full."""
    counts, n = data.encoded.counts, len(data.encoded)
    for what in ("prompt", "response"):
        if cut := counts[f"cut_{what}"]:
            limit = {"prompt": "max_prompt", "response": "max_length"}[what]
            log.info("%d of %d %ss are cut (data.%s is %d tokens)", cut, n, what, limit, config.data[limit])


def _insist_on_same(named: tokenizer.Tokenizer, own: tokenizer.Tokenizer) -> None:
    try:
        tokenizer.same(named, own)
    except DataError as error:
        raise ConfigError(f"config.tokenizer names another tokenizer than the student's folder has: {error}") from error


def _insist_on_same_text(name: str, own: tokenizer.Tokenizer, data: prepare.Data) -> None:
    texts = np.split(data.encoded.tokens, data.encoded.offsets[1:-1])
    if own.decode_batch(texts) != data.tokenizer.decode_batch(texts):
        raise ConfigError(f"{name} has a tokenizer of its own, to which the ids of config.prefix are another text")


def _tokenizer(model: ConfigDict) -> tokenizer.Tokenizer | None:
    """The tokenizer in a model's folder or under its hub id; None in a folder without one."""
    folder = pathlib.Path(model.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in OWN_FILES):
        return None
    return tokenizer.load({"path": model.path, "revision": model.revision})
