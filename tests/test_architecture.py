"""Arrows run one way: the imports between our own modules are what the README says they are."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Layers from the bottom up; a module imports only from layers below its own.
LAYERS = [
    {"kd_jax.errors"},
    {"kd_jax.storage", "kd_jax.plan.chips", "kd_jax.plan.hlo", "kd_jax.plan.published", "kd_jax.plan.stated"},
    {"kd_jax.processes", "kd_jax.private"},
    {
        "kd_jax.losses",
        "kd_jax.sharding",
        "kd_jax.manifest",
        "kd_jax.locks",
        "kd_jax.graph",
        "kd_jax.metrics",
        "kd_jax.data.records",
    },
    {
        "kd_jax.head",
        "kd_jax.optim",
        "kd_jax.checkpoint",
        "kd_jax.lora",
        "kd_jax.sampling",
        "kd_jax.data.tokenizer",
        "kd_jax.data.synthetic",
        "kd_jax.data.roles",
        "kd_jax.distill.policy_gradient",
    },
    {"kd_jax.transformer", "kd_jax.data.encode", "kd_jax.excluded"},
    {"kd_jax.families", "kd_jax.generate", "kd_jax.data.batches", "kd_jax.data.token_ids", "kd_jax.plan.count"},
    {"kd_jax.hf", "kd_jax.score", "kd_jax.prepare", "kd_jax.distill.objective"},
    {
        "kd_jax.pairs",
        "kd_jax.foreign",
        "kd_jax.variants",
        "kd_jax.windows",
        "kd_jax.continued",
        "kd_jax.teacher_cache",
        "kd_jax.utility",
        "kd_jax.train",
        "kd_jax.distill.policies",
        "kd_jax.whitebox.spec",
        "kd_jax.shadow.design",
    },
    {"kd_jax.whitebox.blocks", "kd_jax.whitebox.gradients", "kd_jax.whitebox.lens"},
    {"kd_jax.whitebox.table"},
    {"kd_jax.study", "kd_jax.distill.feeds"},
    {"kd_jax.distill.ledger", "kd_jax.distill.teacher_text", "kd_jax.plan.sketch"},
    {"kd_jax.loop"},
    {"kd_jax.shadow.chains"},
    {"kd_jax.shadow.stage", "kd_jax.runs", "kd_jax.plan.programs", "kd_jax.plan.disk"},
    {"kd_jax.tables", "kd_jax.experiment", "kd_jax.plan.compiled"},
    {"kd_jax.plan.hours", "kd_jax.plan.remedies"},
    {"kd_jax.plan.plan"},
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules(package: str) -> dict[str, Path]:
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts): p
        for p in (ROOT / package).rglob("*.py")
        if p.stem != "__init__"
    }


def test_imports_in_kd_jax_point_downwards():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert set(level) == set(modules("kd_jax")), "every module has its layer"
    for name, path in modules("kd_jax").items():
        for other in imports(path) & set(level):
            assert level[other] < level[name], f"{name} imports {other}"


def test_training_never_imports_the_audit():
    for name, path in modules("kd_jax").items():
        assert not {i for i in imports(path) if i.split(".")[0] in ("attacks", "configs", "main")}, name


def test_the_audit_needs_no_accelerator():
    for path in (ROOT / "attacks").rglob("*.py"):
        assert not {
            i for i in imports(path) if i.split(".")[0] in ("jax", "jaxlib", "flax", "optax", "kd_jax", "transformers")
        }, path


def test_the_program_never_imports_pytorch_or_pickle():
    for package in ("kd_jax", "attacks", "configs"):
        for path in (ROOT / package).rglob("*.py"):
            assert not {i for i in imports(path) if i.split(".")[0] in ("torch", "pickle", "dill", "cloudpickle")}, path
