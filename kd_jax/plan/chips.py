"""Facts about accelerators, and the devices of a named topology.

Bandwidth of the HBM, peak bfloat16 (dense) and interconnect per chip, as their makers publish them. TPU v4, v5e, v5p,
v6e: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, the interconnect as all of a chip's links one way. A100 80GB, H100 and
H200 (SXM): NVIDIA's data sheets, NVLink one way. HBM is what programs get of it: of a TPU's 32, 16, 95 and 32 GB what
the compiler's out-of-memory message (libtpu 0.0.42) calls available, of a GPU's 40, 80 and 141 GB the three quarters
that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. A chip that is here says it itself.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re

import jax

from kd_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator. Rates are per second."""

    name: str
    hbm: float  # bytes that programs get
    bandwidth: float  # bytes of HBM
    peak: float  # bfloat16 FLOP
    network: float  # bytes that leave a chip over all its links


GIB, TERA, GIGA = 2.0**30, 1e12, 1e9
CHIPS = {
    "v4": Chip("TPU v4", 30.75 * GIB, 1228 * GIGA, 275 * TERA, 300 * GIGA),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 819 * GIGA, 197 * TERA, 200 * GIGA),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 2765 * GIGA, 459 * TERA, 600 * GIGA),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 1640 * GIGA, 918 * TERA, 448 * GIGA),
    "a100-40gb": Chip("A100 40GB", 30 * GIGA, 1555 * GIGA, 312 * TERA, 300 * GIGA),
    "a100": Chip("A100 80GB", 60 * GIGA, 2039 * GIGA, 312 * TERA, 300 * GIGA),
    "h100": Chip("H100 SXM", 60 * GIGA, 3350 * GIGA, 989.4 * TERA, 450 * GIGA),
    "h200": Chip("H200 SXM", 0.75 * 141 * GIGA, 4800 * GIGA, 989.4 * TERA, 450 * GIGA),
}
GPUS = {"gpu": "h100", "a100": "a100", "h100": "h100", "h200": "h200"}  # gpu: no kind is named, H100 is assumed
KINDS = {  # as a device names itself; others (a GH200, an H100 on PCIe) have other rates
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for: a TPU slice `v5e:8x8`, `gpu:8` (or `h200:8`), or the host's own, `host`."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"host|(v4|v5p):\d+x\d+x\d+|(v5e|v6e):\d+x\d+|(gpu|a100|h100|h200):\d+", self.name):
            raise ConfigError(
                f"--topology={self.name} is not one of v4:AxBxC, v5p:AxBxC, v5e:AxB, v6e:AxB (chips along each side of "
                "a slice), gpu:N, a100:N, h100:N, h200:N"
            )
        if self.name != "host" and self.chips < 1:
            raise ConfigError(f"--topology={self.name} has no chips")

    @property
    def kind(self) -> str:
        return self.name.split(":")[0]

    @property
    def chips(self) -> int:
        if self.name == "host":
            return jax.device_count()
        size = 1
        for side in self.name.split(":")[1].split("x"):
            size *= int(side)
        return size

    @property
    def chip(self) -> Chip | None:
        """None for a host whose chip is not in the table (a CPU)."""
        if self.name == "host":
            return _own_chip(jax.local_devices()[0])
        return CHIPS[GPUS.get(self.kind, self.kind)]

    @property
    def is_tpu(self) -> bool:
        return self.kind in ("v4", "v5e", "v5p", "v6e")

    @property
    def platform(self) -> str:
        """What the programs take themselves to run on."""
        return jax.default_backend() if self.name == "host" else "tpu" if self.is_tpu else "gpu"

    @property
    def estimated(self) -> bool:
        """Whether memory and collectives are those of another compiler than the chips' own."""
        return self.kind in GPUS

    def devices(self) -> list[jax.Device]:
        """Raises ConfigError where the devices cannot be had, saying what is missing."""
        if self.is_tpu:
            return _tpu_devices(self.name)
        if self.chips > jax.device_count():
            raise ConfigError(f"{self.name} needs {self.chips} virtual devices, there are {jax.device_count()}")
        return jax.devices()[: self.chips]


def _own_chip(device: jax.Device) -> Chip | None:
    """The chip of a device that is here, with the memory that it says programs get."""
    if device.device_kind not in KINDS:
        return None
    chip, limit = CHIPS[KINDS[device.device_kind]], (device.memory_stats() or {}).get("bytes_limit")
    return dataclasses.replace(chip, hbm=float(limit)) if limit else chip


def _tpu_devices(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"--topology={name} needs the TPU compiler: pip install -r requirements-tpu.txt")
    from jax.experimental import topologies

    # No TPU is meant to be found: without these, libtpu asks the cloud's metadata server for one and logs its surprise.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3"}
    quiet |= {"TPU_STDERR_LOG_LEVEL": "3", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v4-8"}
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    # A v4 chip's two cores work as one device.
    config = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **config).devices)
    except Exception as error:  # libtpu raises its own kinds
        raise ConfigError(f"--topology={name}: libtpu knows no such topology ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
