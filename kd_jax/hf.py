"""Import from and export to Hugging Face folders and hub ids.

Only safetensors are read; nothing is unpickled and no remote code runs. Tensors stream through one (stacked) array at a
time, and any that is missing, left over, doubled or mis-shaped is named. The tables are in `families.py`.
"""

import contextlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from kd_jax.families import FAMILIES, CheckpointError, Family, Row, config_from_hf, config_to_hf, family_of, shown
from kd_jax.transformer import ModelConfig, Transformer

__all__ = ["FAMILIES", "CheckpointError", "config_from_hf", "config_to_hf", "load_pretrained", "save_pretrained"]

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
HUB_FILES = ["config.json", "model*.safetensors", "model.safetensors.index.json"]
FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = ("float64", "float32", "float16", "bfloat16")
MOST_BYTES = 32 << 20  # of a JSON file, and of the header of a safetensors file, which is JSON too
CONVERT = (
    'convert it once, where PyTorch is installed and you trust the file: python -c "from transformers import '
    "AutoModelForCausalLM as M; M.from_pretrained('{source}').save_pretrained('NEW_FOLDER')\""
)


def load_pretrained(
    path_or_hub_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: DTypeLike | None = jnp.float32,
    place: Callable[[str, np.ndarray], jax.Array] | None = None,
) -> Transformer:
    """Reads a model from a folder with `config.json` and safetensors (one file, or shards with an index) or a hub id.

    revision: branch, tag or commit of a hub id, such as the pull request that converted a pickle to safetensors.
    dtype: of the parameters; None takes the one that the config names.
    place: called with each path ("blocks.attn.q") and its finished array, returns it on its devices. One (stacked)
      array at a time is on the host, so a checkpoint is never held twice.
    Raises CheckpointError; every tensor is accounted for before the first one is read.
    """
    folder = _find_folder(path_or_hub_id, revision)
    config = _read_json(folder / "config.json")
    family, cfg = family_of(config), config_from_hf(config)
    if dtype is None:
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        if dtype not in DTYPES:
            raise CheckpointError(f"{folder / 'config.json'}: dtype={shown(dtype)}; it must be of {', '.join(DTYPES)}")
    dtype = jnp.dtype(dtype)
    place = place or (lambda path, array: jnp.asarray(array))
    abstract = jax.eval_shape(lambda key: Transformer(cfg, key), jax.random.key(0))
    with contextlib.ExitStack() as stack:
        tensors = _open_tensors(folder, family, cfg, stack)
        arrays: dict[str, jax.Array] = {}
        rows = _expected_rows(family, abstract)
        _check_tensors(folder, tensors, rows, cfg)
        for row, shapes in rows:
            # One expression, so that no variable keeps an array of this row while the next one is read.
            arrays |= {
                path: place(path, array)
                for path, array in zip(row.paths, _read_row(row, shapes, cfg, dtype, tensors), strict=True)
            }
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_dotted(path)], abstract)


def check_pretrained(path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None) -> None:
    """Raises the CheckpointError that `load_pretrained` would, without reading a tensor."""
    folder = _find_folder(path_or_hub_id, revision)
    config = _read_json(folder / "config.json")
    family, cfg = family_of(config), config_from_hf(config)
    abstract = jax.eval_shape(lambda key: Transformer(cfg, key), jax.random.key(0))
    with contextlib.ExitStack() as stack:
        _check_tensors(folder, _open_tensors(folder, family, cfg, stack), _expected_rows(family, abstract), cfg)


def read_config(path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None) -> ModelConfig:
    """The shape of the model in a folder or under a hub id. Raises CheckpointError as `load_pretrained` does."""
    return config_from_hf(_read_json(_find_folder(path_or_hub_id, revision) / "config.json"))


def read_family(path_or_hub_id: str | os.PathLike[str], *, revision: str | None = None) -> str:
    """The family (`model_type`) of the model in a folder or under a hub id."""
    config = _read_json(_find_folder(path_or_hub_id, revision) / "config.json")
    family_of(config)
    return config["model_type"]


def _dotted(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _leaves(model: Transformer) -> dict[str, Any]:
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def _expected_rows(family: Family, model: Transformer) -> list[tuple[Row, list[tuple[int, ...]]]]:
    """The family's rows that this model has, each with the shapes of our (unstacked) arrays."""
    leaves = _leaves(model)
    expected = []
    for row in family.rows:
        if row.paths[0] in leaves:
            stacked = 1 if "{}" in row.name else 0
            expected.append((row, [leaves.pop(path).shape[stacked:] for path in row.paths]))
    if leaves:
        raise CheckpointError(f"{family.architecture} has no tensor for this model's {', '.join(leaves)}")
    return expected


def _names(row: Row, cfg: ModelConfig) -> list[str]:
    return [row.name.format(layer) for layer in range(cfg.layers)] if "{}" in row.name else [row.name]


def _open_tensors(
    folder: Path, family: Family, cfg: ModelConfig, stack: contextlib.ExitStack
) -> dict[str, tuple[Any, str]]:
    """Opens the files (memory-mapped, nothing read yet): the name in our table -> (open file, name in that file)."""
    tensors: dict[str, tuple[Any, str]] = {}
    for path in _tensor_files(folder):
        _check_header(path)
        try:
            file = stack.enter_context(safetensors.safe_open(path, framework="numpy"))
        except (OSError, safetensors.SafetensorError) as error:
            reason = shown(str(error), 200)
            raise CheckpointError(f"{path}: not a readable safetensors file ({reason}); download it again") from None
        for stored in file.keys():
            name = stored if stored.startswith(family.base) or stored == family.head else family.base + stored
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {shown(stored)} is in this checkpoint twice")
            if not re.fullmatch(family.ignored, name):
                tensors[name] = (file, stored)
    if cfg.tie_embeddings and family.head in tensors:
        # Of two tied tensors some programs store both, and some (OPT's conversions on the hub) only the head.
        tensors.setdefault(family.rows[0].name, tensors.pop(family.head))
    return tensors


def _check_header(path: Path) -> None:
    """What the library leaves open: of two tensors with one name it takes the last, other readers the first."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= MOST_BYTES else b""
    if size > MOST_BYTES:
        raise CheckpointError(f"{path}: a header of {size} bytes; at most {MOST_BYTES} are read. Download it again")
    doubled: list[str] = []

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            doubled.extend(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        return found

    with contextlib.suppress(ValueError, RecursionError):  # no JSON: the library says so itself
        json.loads(text, object_pairs_hook=distinct)
    if doubled:
        raise CheckpointError(f"{path}: its header has {_some(doubled)} twice; download it again")


def _tensor_files(folder: Path) -> list[Path]:
    """The files of a folder. An index names files beside it alone: it may have come from somebody else."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = _read_json(index).get("weight_map")
        names = names.values() if isinstance(names, dict) else ()
        if bad := [n for n in names if not isinstance(n, str) or not re.fullmatch(r"[\w.-]+\.safetensors", n, re.A)]:
            raise CheckpointError(f"{index}: {shown(bad[0])} is not the name of a safetensors file in this folder")
        files = [folder / name for name in sorted(set(names))]
        missing = [path.name for path in files if not path.is_file()]
        if missing or not files:
            raise CheckpointError(f"{index}: names no file, or files that are not there: {_some(missing)}")
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        advice = CONVERT.format(source=folder)
        raise CheckpointError(f"{folder}: has {_some(pickles)} but no safetensors, and pickles are not read; {advice}")
    raise CheckpointError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")


def _check_tensors(folder: Path, tensors: Mapping[str, tuple[Any, str]], rows: list, cfg: ModelConfig) -> None:
    expected = {}
    for row, shapes in rows:
        shape = row.layout.pack([np.broadcast_to(np.int8(0), shape) for shape in shapes], cfg).shape
        expected |= dict.fromkeys(_names(row, cfg), shape)
    missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or extra:
        found = [f"{kind} {_some(names)}" for kind, names in (("missing", missing), ("left over", extra)) if names]
        raise CheckpointError(f"{folder}: tensors do not match config.json: {'; '.join(found)}")
    for name, (file, stored) in tensors.items():
        header = file.get_slice(stored)
        if tuple(header.get_shape()) != expected[name]:
            found, wanted = tuple(header.get_shape()), expected[name]
            raise CheckpointError(f"{folder}: tensor {shown(stored)} has shape {found}, config.json asks for {wanted}")
        if header.get_dtype() not in FLOATS:
            raise CheckpointError(f"{folder}: tensor {shown(stored)} is {header.get_dtype()}; only {FLOATS} are read")


def _read_row(
    row: Row, shapes: list[tuple[int, ...]], cfg: ModelConfig, dtype: np.dtype, tensors: Mapping[str, tuple[Any, str]]
) -> list[np.ndarray]:
    names = _names(row, cfg)
    arrays = [np.empty((len(names), *shape), dtype) for shape in shapes]
    for layer, name in enumerate(names):
        file, stored = tensors[name]
        for array, part in zip(arrays, row.layout.unpack(file.get_tensor(stored), cfg), strict=True):
            array[layer] = part
    return arrays if "{}" in row.name else [array[0] for array in arrays]


def _some(names: list[str], most: int = 6) -> str:
    listed = [name if name.isprintable() and len(name) <= 100 else shown(name) for name in names[:most]]
    return ", ".join(listed) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if (size := path.stat().st_size) > MOST_BYTES:
        raise CheckpointError(f"{path}: {size} bytes; at most {MOST_BYTES} are read")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({shown(str(error), 200)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object but a {type(content).__name__}")
    return content


def _find_folder(path_or_hub_id: str | os.PathLike[str], revision: str | None) -> Path:
    source = os.fspath(path_or_hub_id)
    if os.path.isdir(source):
        if revision is not None:
            raise CheckpointError(f"{source} is a folder: revision={revision!r} only makes sense with a hub id")
        return Path(source)
    at = f"{source} (revision {revision or 'main'})"
    try:
        found = huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=HUB_FILES)
    except hub_errors.HFValidationError as error:
        raise CheckpointError(f"{source}: neither a folder nor the id of a model on the hub") from error
    except hub_errors.GatedRepoError as error:
        raise CheckpointError(
            f"{at} is gated: accept its licence at https://huggingface.co/{source}, then log in with `hf auth login` "
            "or set HF_TOKEN"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{at}: the hub has this model but not this revision") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: no folder here, and no model on the hub that you may read; check the spelling, or log in with "
            "`hf auth login` if it is private"
        ) from error
    except (hub_errors.HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{at}: no folder here, not in the local hub cache, and the hub does not answer; run `hf download "
            f"{source}` where there is a network, or give the path of a folder ({type(error).__name__})"
        ) from error
    folder = Path(found)
    if not any(folder.glob("model*.safetensors")):
        raise CheckpointError(
            f"{at} publishes no safetensors. Models that publish only pickles (facebook/opt-*, "
            "openlm-research/open_llama_*) often have them in a pull request: look under 'Community' at "
            f"https://huggingface.co/{source} and pass revision='refs/pr/<number>'; or {CONVERT.format(source=source)}"
        )
    return folder


def save_pretrained(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    family: str,
    tokenizer_files: Iterable[str | os.PathLike[str]] | None = None,
    token_ids: Mapping[str, int] | None = None,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM` opens; it appears whole or not at all, for its owner.

    family: a key of FAMILIES that can express the model's config. The arrays must be addressable from this process.
    tokenizer_files: copied beside the weights. token_ids: `bos_token_id` and the like for `config.json`.
    shard_bytes: larger models are split into files of about this size; no more than one is held on the host.
    Raises CheckpointError where the folder already has something in it, or the family cannot express the model.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder} is not empty: export to a new folder")
    leaves = _leaves(model)
    config = config_to_hf(model.cfg, family, leaves["embed.weight"].dtype.name) | dict(token_ids or {})
    rows = _expected_rows(FAMILIES[family], model)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir(mode=0o700)
    try:
        _write_tensors(partial, _tensors_to_write(rows, leaves, model.cfg), shard_bytes)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in tokenizer_files or ():
            shutil.copy2(file, partial)
        for path in partial.iterdir():
            path.chmod(0o600)
            with path.open("rb") as file:
                os.fsync(file.fileno())  # before the name says that it is whole
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tensors_to_write(rows: list, leaves: Mapping[str, Any], cfg: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    for row, _ in rows:
        arrays = [np.asarray(leaves[path]) for path in row.paths]
        for layer, name in enumerate(_names(row, cfg)):
            parts = [array[layer] for array in arrays] if "{}" in row.name else arrays
            yield name, np.ascontiguousarray(row.layout.pack(parts, cfg))


def _write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int) -> None:
    shards: list[list[str]] = []  # names in every file written so far
    held: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        safetensors.numpy.save_file(held, folder / f"{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        os.replace(folder / "0", folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"{i}", folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
