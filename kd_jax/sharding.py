"""The mesh and the whole sharding policy in one table.

Axes: `data` replicates parameters and splits rows, `fsdp` splits both, `tensor` splits heads, mlp and vocabulary.
Parameters, optimizer state, import and restore all read the same table.
"""

from __future__ import annotations

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

# (end of a parameter's name, its partition). Stacked blocks carry the layer axis in front.
RULES: tuple[tuple[str, P], ...] = (
    (r"(embed|lm_head)\.weight", P("tensor", "fsdp")),
    (r"positions\.weight", P(None, "fsdp")),
    (r"project_in\.weight", P("fsdp", "tensor")),
    (r"project_out\.weight", P("tensor", "fsdp")),
    # `.weight`: of a weight with an adapter (`kd_jax/lora.py`), whose rank is too small to split
    (r"blocks\.attn\.(q|k|v)(\.weight)?", P(None, "fsdp", "tensor")),
    (r"blocks\.attn\.o(\.weight)?", P(None, "tensor", "fsdp")),
    (r"blocks\.mlp\.(up|gate)(\.weight)?", P(None, "fsdp", "tensor")),
    (r"blocks\.mlp\.down(\.weight)?", P(None, "tensor", "fsdp")),
    (r"blocks\.(attn|mlp)\.(q|k|v|up|gate)\.lora_a", P(None, "fsdp", None)),
    (r"blocks\.(attn|mlp)\.(q|k|v|up|gate)\.lora_b", P(None, None, "tensor")),
    (r"blocks\.(attn|mlp)\.(o|down)\.lora_a", P(None, "tensor", None)),
    (r"blocks\.(attn|mlp)\.(o|down)\.lora_b", P(None, None, "fsdp")),
    (r"blocks\.attn\.(q|k|v)_bias", P(None, "tensor")),
    (r"blocks\.mlp\.(up|gate)_bias", P(None, "tensor")),
    (r"blocks\..*(scale|bias|_norm)", P()),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
    """Mesh over all devices; one axis may be -1 and takes what is left. Raises ConfigError if the sizes do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ConfigError(f"mesh sizes must be positive with at most one -1, got {dict(zip(AXES, sizes))}")
    if -1 in sizes:
        known = int(np.prod([s for s in sizes if s != -1]))
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"mesh {dict(zip(AXES, sizes))} needs {int(np.prod(sizes))} devices, there are {len(devices)}"
        )
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    except NotImplementedError as error:  # a torus that these sizes do not divide along its axes
        shape = dict(zip(AXES, sizes))
        raise ConfigError(f"mesh {shape} cannot be laid on these devices; try other sizes ({error})") from error


def names(tree) -> list[str]:
    """Dotted names of a tree's leaves, e.g. `blocks.attn.q`, in flattening order."""
    return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _name(path) -> str:
    parts = [str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path]
    return ".".join(parts[:-1] if parts and parts[-1] == "value" else parts)


def spec_for(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Partition of one array. Axes that do not divide their dimension are dropped (GPT-2's vocabulary is odd).

    Raises ValueError for an array of rank >= 2 that no rule names: nothing is replicated by oversight.
    """
    for pattern, spec in RULES:
        if re.search(rf"(^|\.){pattern}$", name):
            if len(spec) > len(shape):
                raise ValueError(f"sharding rule {pattern!r} has {len(spec)} axes, {name} has shape {shape}")
            fits = [a if a is None or shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(spec)]
            return P(*fits)
    if len(shape) >= 2:
        raise ValueError(f"no sharding rule for {name} {shape}: add a row to kd_jax/sharding.py RULES")
    return P()


def shardings(tree, mesh: Mesh):
    """NamedShardings for a tree of arrays or ShapeDtypeStructs (a model, an optimizer state)."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    specs = [NamedSharding(mesh, spec_for(_name(path), np.shape(x), mesh)) for path, x in flat]
    return jax.tree_util.tree_unflatten(treedef, specs)


def rows(mesh: Mesh, leading: int = 0) -> NamedSharding:
    """Sharding of batch arrays: rows over `data` and `fsdp`, after `leading` unsharded axes."""
    return NamedSharding(mesh, P(*(None,) * leading, BATCH))


def place(name: str, x: np.ndarray, mesh: Mesh) -> jax.Array:
    """A parameter, the same on every process's host, in its partition on the mesh."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec_for(name, x.shape, mesh)), x.__getitem__)


def own_rows(mesh: Mesh, n: int) -> np.ndarray:
    """Which of `n` rows of a batch lie on devices of this process, ascending.

    Several processes hold the same rows where `tensor` crosses them.
    """
    slices = rows(mesh).addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[index] for index in slices]))


def place_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, leading: int = 0, *, whole: bool = False
) -> dict[str, jax.Array]:
    """Host arrays to global device arrays, rows along axis `leading`.

    The arrays hold this process's rows, as `own_rows` names them; `whole`: all rows, the same on every process.
    """
    sharding, shards = rows(mesh, leading), mesh.shape["data"] * mesh.shape["fsdp"]
    parts = len(own_rows(mesh, shards))  # of all shards, how many this process holds

    def place(x: np.ndarray) -> jax.Array:
        n = x.shape[leading] if whole else x.shape[leading] * shards // parts
        own = np.arange(n) if whole else own_rows(mesh, n)
        shape = (*x.shape[:leading], n, *x.shape[leading + 1 :])

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            wanted = index[leading]
            first, last = np.searchsorted(own, [wanted.start or 0, n if wanted.stop is None else wanted.stop])
            return x[(*index[:leading], slice(first, last))]

        return jax.make_array_from_callback(shape, sharding, shard)

    return {k: place(v) for k, v in batch.items()}
