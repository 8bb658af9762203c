"""The report: result tables in, PNG figures and one self-contained page out. Needs no JAX and no score table."""

from pathlib import Path

from attacks import files
from attacks.report.figures import draw_all
from attacks.report.html import page
from attacks.report.results import load


def build(report_dir: str | Path, show_canaries: bool = False) -> Path:
    """Write the PNG figures and `index.html` into `report_dir`, from the tables that the attack stage left there.

    Reads summary.json and membership.csv (FileNotFoundError without them, as after an audit that was cut off), and
    differences.csv, gates.csv, utility.csv and roc.parquet where they exist; ValueError on a table that lacks a column.
    The same tables give the same bytes, and what an earlier report left stays until all of the new one is written.
    No text of a record is shown; `show_canaries` adds three invented canaries, chosen by a rule that stands beside
    them. Returns the path of the page.
    """
    folder = Path(report_dir)
    results = load(folder)
    pictures = draw_all(results)
    html = page(results, pictures, show_canaries).encode()
    files.write(folder, [*((f"{name}.png", picture.png) for name, picture in pictures.items()), ("index.html", html)])
    return folder / "index.html"
