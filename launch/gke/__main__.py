"""Renders a JobSet for one config and one TPU slice.

    python -m launch.gke --config=configs/llama2_kd.py --topology=v5e:8x8 --workdir=gs://bucket/llama2 \\
        --image=REGION-docker.pkg.dev/PROJECT/REPOSITORY/kd_jax:TAG [--spot] [--config.key=value ...] > job.yaml
    kubectl apply -f job.yaml

The cluster needs the JobSet controller, GKE 1.28 or later, and a node pool of the slice's kind; the command that makes
one stands at the top of the manifest. Nothing here talks to a cluster.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

import yaml
from absl import flags
from ml_collections import config_flags

from launch.gke.jobset import jobset, node_pool_command, slices

NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")  # pods append job, index and suffix, and stay below 63


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the arguments that main.py gets besides --config and --workdir."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.gke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.key=value, and what follows --, goes to main.py as it is.",
    )
    add = parser.add_argument
    add("--config", required=True, help="config file, e.g. configs/llama2_kd.py:openllama")
    add("--topology", required=True, help=f"one of {', '.join(slices())}")
    add("--workdir", required=True, help="gs://BUCKET/DIR, which all pods share")
    add("--image", required=True, help="container image with the checkout and requirements-tpu.txt")
    add("--name", default="", help="of the JobSet; default: the config's")
    add("--namespace", default="default")
    add("--service-account", default="", help="Kubernetes service account that may use the bucket")
    add("--hf-secret", default="", help="Secret whose key `token` is a Hugging Face token, for gated weights")
    add("--checkout", default="/opt/kd_jax", help="the checkout's folder in the image (default: %(default)s)")
    add(
        "--restarts",
        type=int,
        default=20,
        help="after preemptions and lost hosts; else a failure stops (default: %(default)s)",
    )
    add("--spot", action="store_true", help="spot nodes")
    own, rest = argv, []
    if "--" in argv:
        own, rest = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    args, unknown = parser.parse_known_args(own)
    if wrong := [a for a in unknown if not re.match(r"--config\..+=", a)]:
        parser.error(f"unknown: {' '.join(wrong)}; flags of main.py other than --config.key=value go after --")
    if args.topology not in slices():
        parser.error(f"--topology={args.topology}: known are {', '.join(slices())}")
    if not re.fullmatch(r"gs://[^/]+(/.*)?", args.workdir):
        parser.error(f"--workdir={args.workdir}: pods have no disk that outlives them; give gs://BUCKET/DIR")
    args.name = args.name or default_name(args.config)
    if not NAME.fullmatch(args.name):
        parser.error(f"--name={args.name}: at most 40 of a-z, 0-9 and -, a letter first, not - last")
    try:
        check_config(args.config, unknown)
    except Exception as error:  # whatever a config file raises; absl puts its traceback into the message
        parser.error(f"--config={args.config}: {str(error).strip().splitlines()[-1]}")
    return args, unknown + rest


def default_name(config: str) -> str:
    """configs/gpt2_kd.py:base,zhang2025 -> gpt2-kd-base-zhang2025."""
    path, _, variant = config.partition(":")
    words = re.sub(r"[^a-z0-9]+", "-", f"{Path(path).stem}-{variant}".lower())
    return words.strip("-")


def check_config(config: str, overrides: list[str]) -> None:
    """Read the config with its overrides, as main.py will: a mistyped key is cheaper here than on a slice. Raises."""
    path = Path(config.partition(":")[0])
    if path.is_absolute() or not path.is_file():
        raise ValueError("no such file in the checkout")
    argv = ["main.py", f"--config={config}", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)


def main(argv: list[str]) -> str:
    """The manifest as YAML, with the node pool's command as a comment. Exits with a message where a flag is wrong."""
    args, rest = parse(argv)
    slice_ = slices()[args.topology]
    manifest = jobset(
        args.name,
        slice_,
        args.image,
        [f"--config={args.config}", f"--workdir={args.workdir}", *rest],
        namespace=args.namespace,
        service_account=args.service_account,
        hf_secret=args.hf_secret,
        checkout=args.checkout,
        restarts=args.restarts,
        spot=args.spot,
    )
    pool = shlex.join(node_pool_command(slice_, args.name, args.spot))
    return f"# A node pool for it: {pool}\n" + yaml.safe_dump(manifest, sort_keys=False, width=120)


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1:]))
