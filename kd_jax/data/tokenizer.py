"""Tokenizers from a folder, from bare files at explicit paths, or trained on the public role."""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kd_jax.data.records import DataError, parse_json, read_text

MOST_BYTES = 256 << 20  # of one of its files, unpacked; the largest published ones have 40 MiB
MOST_IDS = 1 << 24
MOST_GROWTH = 1000  # characters that one may become when a text is normalised

# Where no file says which token ends a text, the first of these that the vocabulary holds. OPT's has both.
_END_OF_TEXT = ("</s>", "<|endoftext|>")
_CANNOT = (
    "the tokenizer cannot cut every text: a token for unknown characters is missing in its files, or a pattern in them "
    "takes too long; use the tokenizer that its model was published with"
)
_CANNOT_JOIN = (
    "the tokenizer cannot make a text of every id: the decoder in its files does not fit its tokens; use the tokenizer "
    "that its model was published with"
)
# What every tokenizer must be able to cut and to join again: letters, an unknown sign, blanks, and a run that costs a
# bad pattern dear.
_PROBE = ("a word", "\N{SNOWMAN}\0\n\t ", "a" * 64 + "!")
_FOLDER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


class Tokenizer:
    """Text to ids and back, without special tokens: who wants BOS or EOS adds their ids.

    A special token that is spelled out in a text is encoded as the plain characters that it consists of, so no record
    can forge the end of a text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, eos: str, bos: str | None) -> None:
        for name, token in (("eos", eos), ("bos", bos)):
            if token is not None and backend.token_to_id(token) is None:
                raise DataError(f"tokenizer.{name} is {token[:100]!r}, which is not in the vocabulary")
        with _refusing(_CANNOT):
            backend.add_special_tokens([token for token in {eos: 0, bos: 0} if token is not None])
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self.eos, self.bos = eos, bos
        self.eos_id: int = backend.token_to_id(eos)
        self.bos_id: int | None = None if bos is None else backend.token_to_id(bos)
        if self.vocab_size > MOST_IDS:
            raise DataError(f"the tokenizer has the id {self.vocab_size - 1}; ids are read up to {MOST_IDS - 1}")
        _insist_on_short_texts(self._spec)
        self.decode_batch(self.encode_batch(_PROBE))

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over vocabulary, merges, added and special tokens; the same whichever files these came from."""
        merges = self._spec["model"].get("merges", [])
        pairs = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in merges]
        vocab = self._spec["model"]["vocab"]
        if isinstance(vocab, dict):
            vocab = self._backend.get_vocab(with_added_tokens=True)
        content = json.dumps([vocab, pairs, self.eos_id, self.bos_id], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @functools.cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self._backend.to_str())

    @functools.cached_property
    def _continuing(self) -> tokenizers.Tokenizer:
        """This tokenizer without the space that some (LLaMA's) put in front of every text."""
        spec = _without_prefix_space(self._spec)
        if spec == self._spec:
            return self._backend
        with _refusing(_CANNOT):
            backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
        backend.encode_special_tokens = True
        return backend

    def encode_batch(self, texts: Sequence[str], *, continuing: bool = False) -> list[list[int]]:
        """Returns the ids of every text. `continuing` texts follow other tokens: no prefix space is added to them.

        Raises DataError, which quotes no text, where the tokenizer's files cannot cut one.
        """
        backend = self._continuing if continuing else self._backend
        with _refusing(_CANNOT):
            encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids, special tokens included as they are written.

        Raises DataError, which quotes no text, where the tokenizer's files cannot join them.
        """
        with _refusing(_CANNOT_JOIN):
            return self._backend.decode(list(ids), skip_special_tokens=False)

    def decode_batch(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """`decode` for many."""
        with _refusing(_CANNOT_JOIN):
            return self._backend.decode_batch([list(row) for row in ids], skip_special_tokens=False)

    def token(self, token_id: int) -> str | None:
        """Returns how the vocabulary spells an id."""
        return self._backend.id_to_token(token_id)

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load` and transformers.AutoTokenizer read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos}
        if self.bos is not None:
            config["bos_token"] = self.bos
        self._backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(spec: Mapping[str, Any], *, train_texts: Iterable[str] | None = None) -> Tokenizer:
    """Returns the tokenizer that `spec` names; keys that are None or empty count as absent.

    Args:
        spec: exactly one of
            path: a Hugging Face folder or hub id (optional `revision`), read as data: nothing in it is run;
            vocab and merges: the two files of a byte-level BPE (GPT-2's encoder.json and vocab.bpe), each also .gz;
            json: a bare tokenizer.json, also .gz;
            train_size: trains a byte-level BPE of this many tokens on `train_texts`;
            and optionally eos, bos: the tokens, where the files do not say or are to be overruled.
        train_texts: texts of the public role.

    Raises:
        DataError: nothing or several things named, files missing or broken, no end-of-text token.
    """
    spec = {key: value for key, value in spec.items() if value not in (None, "", 0)}
    ways = [way for way in ("path", "vocab", "json", "train_size") if way in spec]
    if len(ways) != 1 or ("vocab" in spec) != ("merges" in spec):
        given = ", ".join(sorted(spec)) or "nothing"
        raise DataError(f"name one of tokenizer.path, .vocab with .merges, .json or .train_size (given: {given})")
    if ways == ["path"]:
        backend, special = _read_folder(spec["path"], spec.get("revision"))
    elif ways == ["vocab"]:
        backend, special = _byte_level_bpe(spec["vocab"], spec["merges"]), {}
    elif ways == ["json"]:
        backend, special = _from_json(spec["json"]), {}
    else:
        if train_texts is None:
            raise DataError("tokenizer.train_size needs the texts of the public role to train on")
        backend, special = _train(train_texts, spec["train_size"]), {}

    found = next((token for token in _END_OF_TEXT if backend.token_to_id(token) is not None), None)
    eos = spec.get("eos") or special.get("eos_token") or found
    if eos is None:
        raise DataError("the tokenizer's files name no end-of-text token: set tokenizer.eos")
    # GPT-2, NeoX and OPT begin a text with the token that ends it; a LLaMA tokenizer.json has <s> for that.
    first = "<s>" if ways == ["json"] and eos == "</s>" and backend.token_to_id("<s>") is not None else eos
    bos = spec.get("bos") or (special.get("bos_token") if special else first)
    return Tokenizer(backend, eos=eos, bos=bos)


def same(a: Tokenizer, b: Tokenizer) -> None:
    """Raises DataError that names the first difference unless the two give every text the same ids."""
    if a.fingerprint == b.fingerprint:
        return
    for token_id in range(max(a.vocab_size, b.vocab_size)):
        if a.token(token_id) != b.token(token_id):
            pair = f"{a.token(token_id)!r} and {b.token(token_id)!r}"
            raise DataError(f"the tokenizers differ from id {token_id} on: {pair}. Teacher and student must share one")
    for name in ("eos_id", "bos_id"):
        if getattr(a, name) != getattr(b, name):
            raise DataError(f"the tokenizers' {name} differ: {getattr(a, name)} and {getattr(b, name)}")
    raise DataError("the tokenizers have the same tokens but other merges, so they cut a text differently")


@contextlib.contextmanager
def _refusing(message: str, *, reason: bool = False) -> Iterator[None]:
    """Raise DataError where the library does: bare Exceptions, and Rust's panics, which are none.

    reason: add what the library says; not where it has seen texts, which it may quote.
    """
    try:
        yield
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # pyo3 has it in a module that cannot be imported
        if isinstance(error, MemoryError) or not (panic or isinstance(error, Exception)):
            raise
        raise DataError(f"{message} ({str(error)[:200]})" if reason else message) from None


def _read_folder(path: str | Path, revision: str | None) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    folder = Path(path)
    if not folder.is_dir():
        folder = _download(str(path), revision)
    special: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = _read_json(folder / name) if (folder / name).is_file() else {}
        for key in ("eos_token", "bos_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if not isinstance(value, str | None):
                raise DataError(f"{folder / name}: {key} is a {type(value).__name__}, not a text")
            if value:
                special[key] = value
    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json"), special
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _byte_level_bpe(folder / "vocab.json", folder / "merges.txt"), special
    raise DataError(
        f"{path}: neither tokenizer.json nor vocab.json with merges.txt; only fast tokenizers are read. "
        "Convert it once with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def _download(hub_id: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=list(_FOLDER_FILES)))
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"tokenizer.path {hub_id!r} is no folder, and the hub did not give it: {reason}") from error


def _from_json(path: str | Path) -> tokenizers.Tokenizer:
    text = read_text(Path(path), MOST_BYTES)
    with _refusing(f"{path}: not a tokenizer.json", reason=True):
        return tokenizers.Tokenizer.from_str(text)


def _byte_level_bpe(vocab: str | Path, merges: str | Path) -> tokenizers.Tokenizer:
    ids, lines = _read_json(vocab), read_text(Path(merges), MOST_BYTES).split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    with _refusing(f"{vocab} and {merges} do not make a BPE", reason=True):
        model = models.BPE(vocab=ids, merges=pairs)
    return _byte_level(model)


def _train(texts: Iterable[str], size: int) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size <= len(alphabet):
        raise DataError(f"tokenizer.train_size is {size}; byte-level BPE needs more than {len(alphabet)} tokens")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[_END_OF_TEXT[-1]], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _without_prefix_space(node: Any) -> Any:
    """A copy of (part of) a tokenizer's JSON in which nothing puts a space in front of a text."""
    if isinstance(node, list):
        return [_without_prefix_space(item) for item in node if not _prepends(item)]
    if not isinstance(node, dict):
        return node
    off = {"add_prefix_space": False, "prepend_scheme": "never"}
    keep_as_is = ("model", "added_tokens", "decoder", "post_processor")  # big, or about other things
    return {
        key: value if key in keep_as_is else None if _prepends(value) else off.get(key, _without_prefix_space(value))
        for key, value in node.items()
    }


def _prepends(node: Any) -> bool:
    return isinstance(node, dict) and node.get("type") == "Prepend"


def _read_json(path: str | Path) -> dict[str, Any]:
    content = parse_json(read_text(Path(path), MOST_BYTES), str(path))
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object but a {type(content).__name__}")
    return content


def _insist_on_short_texts(spec: Mapping[str, Any]) -> None:
    """Raises DataError where normalising could make a text larger than memory: each replacement multiplies."""
    growth, todo = 1, [spec.get("normalizer"), spec.get("pre_tokenizer"), spec.get("decoder")]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            growth *= max(1, *(len(node.get(key) or "") for key in ("content", "prepend", "replacement")))
        todo += node if isinstance(node, list) else node.values() if isinstance(node, dict) else ()
    if growth > MOST_GROWTH:
        raise DataError(f"tokenizer.json: its normalizer can make a text {growth} times as long; up to {MOST_GROWTH}")
