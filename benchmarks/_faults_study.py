"""The study that `python -m benchmarks faults` kills: every stage but the filter's loop, every kind of file."""

from ml_collections import ConfigDict

from configs import base, quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config("tiny")
    config.data.synthetic.records = 600
    # Several checkpoints, a grid, a trajectory; and a recipe that keeps its best, which chains do not repeat.
    several = dict(steps=6, batch_rows=16, warmup_steps=0, checkpoints=3, evaluations=3)
    config.recipes.matched = base.recipe("matched", **several, lr_grid=(1e-3, 2e-3))
    config.recipes.best = base.recipe("best", **several, lr=2e-3, select="best_dev_loss")
    for name in ("direct", "null"):
        config.runs[name].recipe = "best"
    config.score.trajectory = 2
    config.whitebox.update(runs=("students/kd",), examples=8, draws=2)
    config.shadow.update(design="full", chains=4, records=80)
    config.attack.bootstrap = 50
    return config
