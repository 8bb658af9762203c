"""Overlapping windows of long texts: where they lie, what of them is scored, and that both roles are cut alike."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import tokenizers
from test_audit_config import checkpoint, read, scored
from test_audit_config import records as made_records

from configs import audit, base
from kd_jax import prepare, windows
from kd_jax.data import encode, records, roles
from kd_jax.data.encode import EOS, PROMPT, RESPONSE, SPECIAL
from kd_jax.data.tokenizer import Tokenizer
from kd_jax.errors import ConfigError

LENGTH = 48  # tokens of an encoded example


def made(bos: str, instructions: bool = False) -> prepare.Data:
    """200 texts of 40 to 239 letters, one token a byte."""
    rng = np.random.default_rng(0)
    rows = [
        {"group": None, "task": "t", "instruction": f"i{i}" if instructions else None, "input": "", "source": f"m:{i}"}
        | {"response": "".join(rng.choice(list("abcdefgh"), 40 + i))}
        for i in range(200)
    ]
    frame = records.make_frame(rows)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate([*alphabet, "<eos>"])}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    tok = Tokenizer(backend, eos="<eos>", bos=None)
    encoded = encode.encode(frame, tok, template="plain", bos=bos, max_length=LENGTH, max_prompt=20)
    return prepare.Data(frame, roles.assign(frame, seed=1), tok, encoded, {})


def asked(data: prepare.Data, **changes) -> windows.Windows | None:
    settings = base.get_config().memorization
    settings.update(dict(coverage_texts=5, cuts=((20, 20),), stride=7) | changes)
    return windows.windows(settings, data, LENGTH, seed=3)


@pytest.mark.parametrize("bos", ["none", "eos"])
def test_windows_are_cut_from_the_text_as_it_was_tokenised_once(bos):
    data = made(bos)
    spec, plain = asked(data), data.of_role("private")
    assert (spec.prefix, spec.suffix, spec.stride, spec.texts) == (20, 20, 7, 5)
    found, facts = windows.build(data, plain, spec)
    texts = data.frame.set_index("example_id").response
    names = list(dict.fromkeys(found.record_id))
    assert len(names) == facts["texts"] == 5 and set(names) <= set(plain.record_id)
    assert facts["windows"] == len(found) and facts["text_tokens"] == sum(len(texts[name]) for name in names)
    seen = {name: [] for name in names}
    for i, name in enumerate(found.example_id):
        record, start = name.split("@")
        at = slice(found.offsets[i], found.offsets[i + 1])
        tokens, kinds = found.tokens[at], found.segment[at]
        assert (kinds == SPECIAL).sum() == (bos == "eos") and not (kinds == EOS).any()
        whole = data.tokenizer.encode_batch([texts[record]])[0]
        assert tokens[kinds != SPECIAL].tolist() == whole[int(start) : int(start) + 40]
        assert kinds[kinds != SPECIAL].tolist() == [PROMPT] * 20 + [RESPONSE] * 20
        assert found.n_bytes[i] == 20 and found.task[i] == "t"
        seen[record].append(int(start))
    for record, starts in seen.items():
        last = len(texts[record]) - 40
        assert starts == sorted({*range(0, last + 1, 7), last})  # the end is covered
    assert found.scored_lengths.tolist() == [20] * len(found)


def test_both_roles_are_cut_alike_and_the_order_of_records_plays_no_part():
    data = made("none")
    spec = asked(data)
    parts = [windows.build(data, data.of_role(role), spec)[0] for role in windows.ROLES]
    assert [len(set(part.record_id)) for part in parts] == [5, 5]
    shuffled = prepare.Data(data.frame, data.splits[::-1], data.tokenizer, data.encoded, {})
    assert asked(shuffled) == spec
    again, _ = windows.build(shuffled, shuffled.of_role("private"), spec)
    assert again.example_id.tolist() == parts[0].example_id.tolist()
    few, _ = windows.build(data, data.of_role("private"), asked(data, coverage_texts=2))
    assert few.example_id.tolist() == parts[0].example_id[: len(few)].tolist()


def test_windows_are_shorter_where_context_or_texts_are():
    data = made("none")
    assert asked(data, cuts=()) == windows.Windows(24, 24, 7, 5, 3)  # 50 + 50 do not fit into 48 tokens
    assert asked(made("eos"), cuts=()).size == 47
    assert asked(data, cuts=((10, 5), (30, 90))).prefix == 12 and asked(data, cuts=((10, 5), (30, 90))).suffix == 36
    lengths = data.frame.set_index("example_id").response.str.len()
    shortest = min(lengths[sorted(set(data.of_role(role).record_id))].min() for role in windows.ROLES)
    whole = windows.windows(base_settings(coverage_texts=1000), data, 1000, 0)  # all texts of both roles
    assert 40 <= whole.size == shortest < 100


def base_settings(**changes):
    settings = base.get_config().memorization
    settings.update(changes)
    return settings


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(coverage_texts=-1), "coverage_texts must not be negative"),
        (dict(stride=0), "stride must be positive"),
    ],
)
def test_wrong_settings_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        asked(made("none"), **change)


def test_instructions_have_no_long_texts_and_nothing_is_done_unasked():
    assert asked(made("none"), coverage_texts=0) is None
    with pytest.raises(ConfigError, match="needs plain texts, and the role private has none"):
        asked(made("none", instructions=True))
    with pytest.raises(ConfigError, match="windows of 15 tokens are all that"):
        windows.windows(base_settings(coverage_texts=5), made("none"), 15, 0)


def test_the_score_stage_writes_them_as_a_variant(tmp_path):
    config = audit.get_config()
    config.student = checkpoint(tmp_path / "student", 0)
    for seed, name in enumerate(("members", "nonmembers")):
        rows = made_records(60, seed)
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{r['output']} {r['instruction']}" for r in rows))
        config[name] = str(tmp_path / f"{name}.txt")
    config.score.variants = ()
    config.memorization.update(coverage_texts=3, stride=4, cuts=((10, 12),))
    study = scored(config, tmp_path / "work")
    for role in ("private", "heldout"):
        table = read(tmp_path / "work", "student", role, "windows")
        texts = read(tmp_path / "work", "student", role).set_index("example_id").target_id
        assert table.example_id.str.partition("@")[0].nunique() == 3 and set(table.n_tokens) == {12}
        for row in table.itertuples():
            record, start = row.example_id.split("@")
            at = int(start) + 10 - 1  # the first token of a text is not in its plain table
            assert row.target_id.tolist() == texts[f"{record}#0"][at : at + 12].tolist()
    folder = tmp_path / "work" / "scores" / "student" / "seed0" / "windows"
    assert pq.read_schema(folder / "private-00000.parquet").metadata[b"variant"] == b"windows"
    assert not (folder / "calib-00000.parquet").exists() and study.config.memorization.stride == 4
