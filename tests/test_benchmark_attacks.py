"""The benchmark of the attacks on a hundredth of its tables: it runs, and says what it measured."""

from benchmarks.attacks import measure, write_tables


def test_small_tables_are_measured(tmp_path, capsys):
    write_tables(tmp_path, 300, 16)
    measure(tmp_path, 50, extras=True)
    said = capsys.readouterr().out
    assert "30 attacks on the student" in said and "peak memory" in said and "permutations" in said and "BCa" in said
