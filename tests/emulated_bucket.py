"""A run's files in a bucket of an emulator of Google Cloud Storage: what test_storage starts in its own process."""

import http
import os
import socket
import subprocess
import sys
import time

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    PORT = free.getsockname()[1]
# Read when the libraries first talk: gcsfs and google-cloud-storage, tensorstore, and gcsfs's look for folders by gRPC.
os.environ |= {
    "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{PORT}",
    "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{PORT}",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    "GOOGLE_CLOUD_PROJECT": "none",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    "JAX_PLATFORMS": "cpu",
}

import grain
import jax
import jax.numpy as jnp
import numpy as np
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

from kd_jax import storage
from kd_jax.checkpoint import Checkpoints, load_params, save_params
from kd_jax.errors import ConfigError
from kd_jax.metrics import Metrics

CUT_OFF = """
import os, sys, threading
from kd_jax import storage
threading.Timer(0.25, os._exit, [9]).start()
while True:
    storage.write_bytes(storage.as_path(sys.argv[1]), os.urandom(1) * (60 << 20))  # goes in two pieces
"""


def serve(port: int) -> None:
    """Start the emulator, with one bucket of the name `bucket`, in a thread."""
    for _, methods in server.HANDLERS:
        for method, handler in methods.items():
            if handler in (objects.get, objects.download, objects.insert, objects.delete):
                methods[method] = conditional(handler)
    server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").start()


def conditional(handler):
    """Google says which generation of an object it sends, and takes conditions on it; the emulator does neither.

    tensorstore depends on both where arrays share a database.
    """

    def handle(request, response, storage):
        name = request.params.get("object_id") or request.query.get("name", [""])[0]

        def generation() -> str:
            try:
                return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
            except NotFound:
                return "0"

        if name and request.query.get("ifGenerationMatch", [generation()])[0] != generation():
            response.status = http.HTTPStatus.PRECONDITION_FAILED
        elif name and request.query.get("ifGenerationNotMatch", [""])[0] == generation():
            response.status = http.HTTPStatus.NOT_MODIFIED
        else:
            handler(request, response, storage)
            response["x-goog-generation"] = generation()

    return handle


def main() -> None:
    work = storage.as_path("gs://bucket/study")
    storage.check(work)
    files(work / "files")
    params(work / "runs")
    checkpoints(work / "runs" / "checkpoints")
    with Metrics(work / "runs") as writer:
        writer.write(1, {"train/loss": 1.0})
    kept = [p.name for p in (work / "runs").iterdir()]
    assert "metrics.jsonl" in kept and any(name.startswith("events.out.tfevents") for name in kept), kept
    try:
        storage.check(storage.as_path("gs://another/study"))
        raise AssertionError("a bucket that is not there was taken")
    except ConfigError as error:
        assert "does the bucket exist" in str(error)


def files(folder) -> None:
    storage.write_bytes(folder / "a", b"old")
    storage.write_bytes(folder / "d" / "b", bytes(6 << 20))
    storage.copytree(folder, work := folder.parent / "copy")
    with storage.local_copy(work, write=True) as here:
        assert (here / "d" / "b").stat().st_size == 6 << 20
        (here / "d" / "b").unlink()
        (here / "c").write_text("new")
    assert sorted(p.name for p in work.iterdir()) == ["a", "c"] and (work / "c").read_text() == "new"
    storage.rmtree(work)
    assert not work.exists() and sorted(p.name for p in folder.glob("*")) == ["a", "d"]
    # A process that is killed while it uploads: the object is the old one or a whole new one.
    done = subprocess.run([sys.executable, "-c", CUT_OFF, str(folder / "a")])
    content = (folder / "a").read_bytes()
    assert done.returncode == 9 and (content == b"old" or (len(content) == 60 << 20 and len(set(content)) == 1))


def tree(shift: float = 0.0) -> tuple[dict, dict]:
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P("fsdp"))
    arrays = {"a": jax.device_put(jnp.arange(32.0).reshape(8, 4) + shift, place), "b": jnp.ones((3,), jnp.bfloat16)}
    abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in arrays.items()}
    return arrays, abstract


def same(found: dict, arrays: dict) -> bool:
    return all(np.array_equal(found[k], x) and found[k].sharding == x.sharding for k, x in arrays.items())


def params(folder) -> None:
    for shift in (0.0, 1.0):  # written anew over an older one
        arrays, abstract = tree(shift)
        save_params(folder / "params", arrays)
        assert same(load_params(folder / "params", abstract), arrays)
    storage.copytree(folder / "params", folder / "best")
    storage.rmtree(folder / "params")
    assert same(load_params(folder / "best", abstract), arrays)


def checkpoints(folder) -> None:
    numbers = lambda: iter(grain.MapDataset.range(100).to_iter_dataset())
    feed = lambda step: {name: np.full(5, step) for name in ("seen", "stored", "created", "tokens")}
    data = numbers()
    with Checkpoints(folder, keep=2) as kept:
        assert kept.latest_step is None
        for step in (1, 2, 3):
            next(data)
            kept.save(step, tree(step)[0], feed(step), {"data": data})
        assert kept.latest_step == 3
    # As a process leaves it that is killed while it saves: without the mark of a whole one.
    (folder / "3" / "commit_success.txt").unlink()
    arrays, abstract = tree(2)
    with Checkpoints(folder, keep=2) as kept:
        assert kept.latest_step == 2
        data = numbers()
        state, found = kept.restore(abstract, feed(0), {"data": data})
        assert same(state, arrays) and all(np.array_equal(found[k], x) for k, x in feed(2).items()) and next(data) == 2
        kept.save(3, tree(3)[0], feed(3), {"data": data})
        assert kept.latest_step == 3


if __name__ == "__main__":
    serve(PORT)
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.1f} s")
    print("all kept", flush=True)
    os._exit(0)  # the emulator's thread and the clients' would be waited for
