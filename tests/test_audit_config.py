"""Audits of checkpoints trained elsewhere, and of score tables made elsewhere."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import tokenizers
from make_fixtures import CASES
from test_end_to_end import start

from attacks import audit as audits
from attacks.tables import TableError
from configs import audit
from kd_jax import hf, prepare, runs, sharding, storage, tables
from kd_jax.data.records import DataError
from kd_jax.data.roles import by_file
from kd_jax.errors import ConfigError
from kd_jax.families import FAMILIES
from kd_jax.manifest import StaleWork
from kd_jax.study import open_study
from kd_jax.transformer import Transformer

ROOT = Path(__file__).parent.parent
WORDS = "lamp river stone Cloud table green Seven quiet paper north glass honey tiger piano maple Storm".split()
END = "<|endoftext|>"


def records(n: int, seed: int, extra: str = "") -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        words = [*rng.choice(WORDS, 12), f"{seed}{i:03d}"]
        answer = " ".join([*rng.choice(words, rng.integers(5, 10)), *([extra] if extra else [])])
        rows.append({"instruction": f"Tell of {' '.join(words[:2])} {rng.integers(10**6)}", "output": answer})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_tokenizer(folder: Path, size: int, bos: str | None = None) -> int:
    """A byte-level BPE as transformers saves one; returns its size."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    special = [END, *([bos] if bos else [])]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"{r['instruction']} {r['output']}" for r in records(60, 9)], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    told = {"eos_token": END} | ({"bos_token": bos} if bos else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return backend.get_vocab_size()


def checkpoint(folder: Path, seed: int, size: int = 320) -> str:
    """A random GPT-2 with its tokenizer, written without PyTorch."""
    vocab = save_tokenizer(folder / "tokens", size)
    sizes = {"model_type": "gpt2", "vocab_size": vocab, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    hf.save_pretrained(
        Transformer(hf.config_from_hf(sizes), jax.random.key(seed)),
        folder / "model",
        family="gpt2",
        tokenizer_files=sorted((folder / "tokens").iterdir()),
    )
    return str(folder / "model")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """Checkpoints (`other` has a tokenizer of its own) and two files of 150 records."""
    root = tmp_path_factory.mktemp("made")
    paths = {name: checkpoint(root / name, seed) for seed, name in enumerate(("student", "teacher", "reference"))}
    paths["other"] = checkpoint(root / "other", 3, size=290)
    paths["members"] = write(root / "members.jsonl", records(150, 1))
    paths["nonmembers"] = write(root / "nonmembers.jsonl", records(150, 2))
    return paths


def configured(made: dict[str, str], **changes):
    config = audit.get_config()
    config.update({key: made[key] for key in ("student", "members", "nonmembers")})
    config.data.template = "plain"
    config.score.variants = ()
    config.attack.bootstrap = 50
    config.update(changes)
    return config


def opened(config, workdir: Path):
    return open_study(config, workdir, sharding.make_mesh())


def scored(config, workdir: Path):
    with jax.set_mesh(sharding.make_mesh()):
        study = opened(config, workdir)
        tables.score_runs(study)
    return study


def read(workdir: Path, run: str, role: str, variant: str = "plain") -> pd.DataFrame:
    return pd.read_parquet(workdir / "scores" / run / "seed0" / variant / f"{role}-00000.parquet")


# --- the same numbers as transformers --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_log_probabilities_agree_with_transformers(family, made, tmp_path, check):
    """Every scored token of 300 records. Compared with AutoModelForCausalLM in float64, the prompt tokenised here from
    the text, the response as the ids that stand in the table."""
    torch = pytest.importorskip("torch")
    import transformers

    folder, first = tmp_path / "model", family in ("llama", "opt")
    vocab = save_tokenizer(folder, 320, bos="<s>" if first else None)
    kind, arguments = CASES[family]
    longest = {"n_positions": 96} if family == "gpt2" else {"max_position_embeddings": 96}
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**(arguments | longest | {"vocab_size": vocab}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(folder)

    study = scored(configured(made | {"student": str(folder)}), tmp_path / "work")
    assert study.config.data.bos == ("bos" if first else "none")
    found = pd.concat([read(tmp_path / "work", "student", role) for role in ("private", "heldout", "calib")])
    texts = study.data.frame.set_index("example_id")
    cutter = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = [cutter.token_to_id("<s>")] if first else []
    rows = [
        [*start, *cutter.encode(f"{texts.instruction[r.example_id]}\n", add_special_tokens=False).ids, *r.target_id]
        for r in found.itertuples()
    ]
    for row, each in zip(rows, found.itertuples()):
        answer = row[len(row) - len(each.target_id) :]
        assert cutter.decode(answer[:-1]) == texts.response[each.example_id] and answer[-1] == cutter.token_to_id(END)
    lengths = np.array([len(row) for row in rows])
    tokens = torch.tensor([row + [0] * (lengths.max() - len(row)) for row in rows])
    seen = torch.arange(lengths.max()) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        logp = model.double()(tokens, attention_mask=seen.long()).logits.log_softmax(-1)
    theirs = logp[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].numpy()
    worst = max(
        np.abs(theirs[i, n - 1 - len(each.logp) : n - 1] - each.logp).max()
        for i, (n, each) in enumerate(zip(lengths, found.itertuples()))
    )
    assert len(found) == 300 and np.ptp(np.concatenate(found.logp.to_numpy())) > 1
    check(f"audit: log p of transformers, {family}", worst, 1e-4)


# --- the program -----------------------------------------------------------------------------------------------------


def test_an_audit_from_the_command_line(made, tmp_path):
    """With a blind gate that fires, and a second start."""
    flags = [f"--config.{key}={made[key]}" for key in ("student", "teacher")]
    members, work = write(tmp_path / "m.jsonl", records(150, 1, extra="zebra")), tmp_path / "work"
    flags += [f"--config.members={members}", f"--config.nonmembers={made['nonmembers']}"]
    flags += ["--config.data.template=plain", "--config.attack.bootstrap=50"]
    done = start(work, *flags, config="configs/audit.py")
    assert done.returncode == 0, done.stderr[-3000:]
    sentence, report = done.stdout.splitlines()
    assert sentence.startswith("No headline number: the text alone tells members from non-members in ")
    assert report == f"Report: {work / 'report' / 'index.html'}" and not (work / "runs").exists()
    summary = json.loads((work / "report" / "summary.json").read_text())
    assert summary["headline"]["model"] == "student"
    assert any("the two files say who is a member" in warning for warning in summary["warnings"])
    assert any("no classifier sees how frequent" in warning for warning in summary["warnings"])
    assert {u["attacks"]: u["reason"] for u in summary["unavailable"]}["dc_pdd"].startswith("no text/token_counts.npz")
    found = pd.read_csv(work / "report" / "membership.csv", keep_default_na=False, na_values=[""])
    assert set(found.model) == {"student", "teacher"} and {"recall", "lowercase"} <= set(found.attack)
    assert set(found.n_members.dropna()) == {135} and not found[found.metric == "tpr_at_fpr_0.01"].value.isna().all()
    assert any("TPR at an FPR of 0.1 %: too few non-members" in line for line in summary["not_tested"])
    assert (pd.read_csv(work / "report" / "agreement.csv").student == "student").all()

    again = start(work, *flags, config="configs/audit.py")
    assert again.stdout == f"All done before.\n{done.stdout}" and again.returncode == 0


def test_there_is_nothing_to_train(made, tmp_path, capfd):
    runs.train_runs(opened(configured(made), tmp_path))
    assert capfd.readouterr() == ("", "") and {p.name for p in tmp_path.iterdir()} == {"records", "splits.parquet"}


def test_a_changed_file_is_refused(made, tmp_path):
    mine = made | {"members": write(tmp_path / "m.jsonl", records(150, 1))}
    opened(configured(mine), tmp_path / "work")
    write(tmp_path / "m.jsonl", records(150, 1)[::-1])
    opened(configured(mine), tmp_path / "work")  # the order of the lines is nothing
    write(tmp_path / "m.jsonl", records(149, 1))
    with pytest.raises(StaleWork, match=r"the split in .* was made from other inputs:\n  members: was '\w+', is '\w+'"):
        opened(configured(mine), tmp_path / "work")


def test_a_changed_checkpoint_is_refused(made, tmp_path):
    config = configured(made)
    scored(config, tmp_path)
    path = Path(made["student"]) / "model.safetensors"
    before = path.read_bytes()
    weights = safetensors.numpy.load_file(path)
    try:
        safetensors.numpy.save_file({name: tensor + 0.01 for name, tensor in weights.items()}, path)
        with pytest.raises(StaleWork, match=r"scores of student seed 0 .*\n  model.files: was"):
            scored(config, tmp_path)
    finally:
        path.write_bytes(before)


def test_a_model_may_join_later_but_not_leave(made, tmp_path):
    scored(configured(made), tmp_path)
    study = scored(configured(made, teacher=made["teacher"]), tmp_path)
    settings = dict(bootstrap=50, attacks=["loss"], tasks=False, references=[])
    audits.audit(tmp_path / "scores", tmp_path / "out", settings)
    assert list(study.runs) == ["teacher", "student"]
    assert set(pd.read_csv(tmp_path / "out" / "agreement.csv").teacher) == {"teacher"}
    with pytest.raises(ConfigError, match="scores/teacher is left from an audit with a teacher: name it again"):
        opened(configured(made), tmp_path)


def test_plain_text_and_a_reference_with_its_own_tokenizer(made, tmp_path):
    texts = {}
    for name in ("members", "nonmembers"):
        rows = [row["output"] + " " + row["instruction"] for row in records(60, len(name))]
        texts[name] = str(tmp_path / f"{name}.txt")
        Path(texts[name]).write_text("\n\n".join(rows))
    config = configured(made | texts, reference=made["other"])
    study = scored(config, tmp_path / "work")
    ours, theirs = (read(tmp_path / "work", run, "heldout") for run in ("student", "reference"))
    assert ours.example_id.tolist() == theirs.example_id.tolist() and len(ours) == 54
    for run, table, folder in (("student", ours, made["student"]), ("reference", theirs, made["other"])):
        cutter = tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        text = study.data.frame.set_index("example_id").response[table.example_id[0].split("#")[0]]
        ids = cutter.encode(text).ids  # the first token has nothing before it, the last is the end
        assert table.target_id[0].tolist() == [*ids[1:], cutter.token_to_id(END)], run
    assert {len(a) for a in ours.target_id} != {len(a) for a in theirs.target_id}
    settings = dict(bootstrap=50, attacks=["loss", "reference", "wbc"], tasks=False)
    summary = audits.audit(tmp_path / "work" / "scores", tmp_path / "out", settings)
    assert any("cross_tokenizer: student and reference" in warning for warning in summary["warnings"])
    found = pd.read_csv(tmp_path / "out" / "membership.csv", keep_default_na=False, na_values=[""])
    auc = found[(found.model == "student") & (found.metric == "auc")].set_index("attack").value
    assert np.isfinite(auc["reference:reference"]) and np.isnan(auc["wbc:reference"])
    config.score.pairs = ("reference:student",)
    with pytest.raises(ConfigError, match="reference:student have different tokenizers"):
        tables.score_runs(opened(config, tmp_path / "work"))


# --- roles and wrong input -------------------------------------------------------------------------------------------


def test_roles_come_from_the_files(made, tmp_path):
    data = prepare.prepare(configured(made, tokenizer={"path": made["student"]}, data=LENGTHS), tmp_path)
    splits = data.splits.set_index("example_id")
    assert splits.role.value_counts().to_dict() == {"private": 135, "heldout": 135, "calib": 30}
    members = prepare.records.load(made["members"]).example_id
    assert set(members) == set(
        splits.index[(splits.role == "private") | ((splits.role == "calib") & (splits.coin == 1))]
    )
    assert set(data.frame.task) == {"all"}  # the name of a file would tell all
    frames = [prepare.records.load(made[name]) for name in ("members", "nonmembers")]
    shuffled = by_file(*(frame.sample(frac=1, random_state=1) for frame in frames), 0.1)
    assert shuffled.set_index("example_id").role.loc[splits.index].equals(splits.role)
    assert set(by_file(*frames, 0).role) == {"private", "heldout"}


LENGTHS = {"max_length": 96, "max_prompt": 48, "bos": "none"}


def pickled(folder: Path, source: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text((Path(source) / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"")
    return str(folder)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda m, t: dict(student=""), ConfigError, "an audit of checkpoints needs --config.student=...; see"),
        (lambda m, t: dict(nonmembers=""), ConfigError, "needs --config.nonmembers=..."),
        (lambda m, t: dict(student=str(t / "none")), hf.CheckpointError, "none"),
        (lambda m, t: dict(reference=str(t / "none")), hf.CheckpointError, "none"),
        (lambda m, t: dict(members=str(t / "none.jsonl")), DataError, "none.jsonl: no such file"),
        (lambda m, t: dict(members=str(t)), DataError, "cannot tell the format"),
        (lambda m, t: dict(members=write(t / "e.jsonl", [])), DataError, "e.jsonl: no records in it"),
        (
            lambda m, t: dict(nonmembers=m["members"]),
            DataError,
            "150 of 150 members have the same content as a non-mem",
        ),
        (
            lambda m, t: dict(nonmembers=write(t / "few.jsonl", records(20, 7))),
            DataError,
            r"few.jsonl: 18 records are left to evaluate \(data.minimum: 25\)",
        ),
        (lambda m, t: dict(calib_share=1.5), ConfigError, "calib_share is 1.5"),
        (lambda m, t: dict(teacher=pickled(t / "p", m["student"])), hf.CheckpointError, "has pytorch_model.bin but no"),
        (lambda m, t: dict(tokenizer={"path": m["other"]}), ConfigError, "names another tokenizer than the student's"),
        (
            lambda m, t: dict(tokenizer={"path": str(big(t))}, student=bare(t / "b", m["student"])),
            ConfigError,
            "models.student has 320 vocabulary rows, the tokenizer 340 tokens",
        ),
        (lambda m, t: dict(student=bare(t / "b", m["student"])), DataError, "b: neither tokenizer.json nor vocab.json"),
        (lambda m, t: dict(score={"variants": ("neighbours",)}), ConfigError, "neighbours needs the token frequencies"),
    ],
)
def test_wrong_input_is_named_in_a_line(change, error, words, made, tmp_path):
    with pytest.raises(error, match=words) as caught:
        scored(configured(made, **change(made, tmp_path)), tmp_path / "work")
    assert "\n" not in str(caught.value)
    assert not [row["output"] for row in records(150, 1) if row["output"] in str(caught.value)]


def big(folder: Path) -> Path:
    save_tokenizer(folder / "big", 340)
    return folder / "big"


def bare(folder: Path, source: str) -> str:
    """A checkpoint without its tokenizer."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.symlink(Path(source) / name, folder / name)
    return str(folder)


def test_a_tokenizer_may_lie_elsewhere(made, tmp_path):
    study = opened(
        configured(made | {"student": bare(tmp_path / "b", made["student"])}, tokenizer={"path": made["student"]}),
        tmp_path / "w",
    )
    assert study.vocab == 320 and list(study.runs) == ["student"] and not study.own_data


def test_a_start_that_died_is_resumed(made, tmp_path, monkeypatch):
    """Shards that were written stay; the unfinished table is refused by the audit and finished by the next start."""
    config, kept = configured(made), storage.write_parquet

    def die(path, *args):
        if "heldout" in path.name:
            raise KeyboardInterrupt
        kept(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr("kd_jax.score.write_parquet", die)
        with contextlib.suppress(KeyboardInterrupt):
            scored(config, tmp_path)
    first = tmp_path / "scores" / "student" / "seed0" / "plain" / "private-00000.parquet"
    written = first.stat().st_mtime_ns
    with pytest.raises(TableError, match="scoring is not finished"):
        audits.audit(tmp_path / "scores", tmp_path / "out", {})
    scored(config, tmp_path)
    assert first.stat().st_mtime_ns == written and len(read(tmp_path, "student", "heldout")) == 135


# --- tables made elsewhere -------------------------------------------------------------------------------------------


def attack(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """`python -m attacks` where neither JAX nor kd_jax can be imported."""
    block = "import sys; sys.modules |= dict.fromkeys(('jax', 'kd_jax', 'flax', 'transformers')); "
    run = f"sys.argv = ['attacks', *{arguments!r}]; import runpy; runpy.run_module('attacks', run_name='__main__')"
    code = block + run
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The tables of the example in docs/score_tables.md."""
    folder = tmp_path_factory.mktemp("example")
    text = (ROOT / "docs" / "score_tables.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    return folder


def test_the_documented_example_is_audited_without_jax(example):
    done = attack("scores", "--out=report", cwd=example)
    assert done.returncode == 0, done.stderr
    assert "holds only the student ranks a private record above an unseen one" in done.stdout
    assert "(150 members, 150 non-members, one seed)" in done.stdout and done.stdout.endswith("index.html\n")
    assert "no metadata in its score tables: taken by their path" in done.stdout
    found = pd.read_csv(example / "report" / "membership.csv", keep_default_na=False, na_values=[""])
    auc = found[(found.model == "student") & (found.metric == "auc")].set_index("attack").value
    members, others = (
        np.array(
            [row.mean() for row in pd.read_parquet(example / f"scores/student/seed0/plain/{r}-00000.parquet").logp]
        )
        for r in ("private", "heldout")
    )
    assert auc["loss"] == pytest.approx((members[:, None] > others).mean()) and auc["reference:reference"] > 0.95


def test_the_document_names_the_columns_that_there_are(made, tmp_path):
    scored(configured(made), tmp_path)
    text = (ROOT / "docs" / "score_tables.md").read_text()
    columns = read(tmp_path, "student", "private").columns
    assert len(columns) > 15 and not [name for name in columns if f"`{name}`" not in text]


def broken(path: Path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


PLAIN = "student/seed0/plain/private-00000.parquet"


def replaced(name: str, values) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(t.column_names.index(name), name, pa.array(values(t)))


@pytest.mark.parametrize(
    "path, change, words",
    [
        (PLAIN, lambda t: t.drop_columns(["segment"]), "no column segment"),
        (PLAIN, replaced("logp", lambda t: [-1.0] * len(t)), "logp is double, not a list"),
        (PLAIN, replaced("segment", lambda t: [1] * len(t)), "segment is int64, not a list"),
        (PLAIN, replaced("logp", lambda t: [["a"] * len(row) for row in t["logp"]]), "logp is list<.*>, not numbers"),
        (PLAIN, replaced("logp", lambda t: [row.as_py()[1:] for row in t["logp"]]), "values of logp and"),
        (PLAIN, replaced("role", lambda t: ["heldout"] * len(t)), "rows of role heldout in a file of role 'private'"),
        (PLAIN, None, "not a Parquet file, or a damaged one"),
        ("text/private.parquet", None, "private.parquet: not a Parquet file, or a damaged one"),
        ("text/private.parquet", lambda t: t.drop_columns(["prompt_ids"]), "no column prompt_ids; it needs example_id"),
        ("text/private.parquet", replaced("response_ids", lambda t: [7] * len(t)), "response_ids must be a list"),
        ("text/private.parquet", replaced("response_ids", lambda t: [[]] * len(t)), "150 texts without a token"),
        ("text/splits.parquet", lambda t: t, "no column role, coin"),
        ("text/token_counts.npz", None, "no array `counts` in it"),
    ],
)
def test_broken_tables_are_named(example, tmp_path, path, change, words):
    scores = tmp_path / "scores"
    subprocess.run(["cp", "-r", str(example / "scores"), str(scores)], check=True)
    target = scores / path
    if change is None:
        target.write_bytes(b"PAR1 nothing")
    elif target.exists():
        broken(target, change)
    else:
        pq.write_table(pa.table({"example_id": ["private-0"]}), target)
    with pytest.raises(TableError, match=words) as caught:
        audits.audit(scores, tmp_path / "out", {"bootstrap": 50, "attacks": ["loss"]})
    assert target.name in str(caught.value)


def test_counts_of_a_smaller_vocabulary_are_an_error(example, tmp_path):
    scores = tmp_path / "scores"
    subprocess.run(["cp", "-r", str(example / "scores"), str(scores)], check=True)
    np.savez(scores / "text" / "token_counts.npz", counts=np.ones(10))
    with pytest.raises(ValueError, match="token_counts.npz counts 10 ids, the text tables have id 9"):
        audits.audit(scores, tmp_path / "out", {"bootstrap": 50, "attacks": ["loss"]})
