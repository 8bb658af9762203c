"""A JobSet that runs main.py on one TPU slice: plain dictionaries, so that nothing is pasted into YAML.

Field names are those of https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and of Kubernetes' Job. What GKE
does itself: it gives the pods TPU_WORKER_ID and TPU_WORKER_HOSTNAMES, from which jax.distributed finds its processes,
and the toleration of the nodes' google.com/tpu taint.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

PREEMPTED = 75  # EX_TEMPFAIL: what main.py ends with where it wants to be started again
ABANDONED = 134  # SIGABRT: how jax.distributed ends a process that misses another, whose host may be gone
TABLE = Path(__file__).parent.parent / "topologies.txt"


@dataclasses.dataclass(frozen=True)
class Slice:
    """A row of launch/topologies.txt."""

    topology: str  # as --stages=plan spells it: v5e:8x8
    accelerator_type: str  # of the Cloud TPU API
    hosts: int
    chips_per_host: int
    runtime: str
    accelerator: str  # value of the node label cloud.google.com/gke-tpu-accelerator
    machine: str  # machine type of a node pool

    @property
    def shape(self) -> str:
        return self.topology.partition(":")[2]


def slices() -> dict[str, Slice]:
    """The known slices by topology."""
    found = {}
    for line in TABLE.read_text().splitlines():
        if line and not line.startswith("#"):
            topology, kind, hosts, chips, *names = line.split()
            found[topology] = Slice(topology, kind, int(hosts), int(chips), *names)
    return found


def node_pool_command(slice_: Slice, name: str, spot: bool) -> list[str]:
    """The gcloud command that makes a node pool of the slice's kind; cluster and place are left to the reader."""
    return [
        "gcloud", "container", "node-pools", "create", name, "--cluster=CLUSTER", "--location=REGION",
        "--node-locations=ZONE", f"--machine-type={slice_.machine}", f"--tpu-topology={slice_.shape}",
        f"--num-nodes={slice_.hosts}", *(["--spot"] if spot else []),
    ]  # fmt: skip


def jobset(
    name: str,
    slice_: Slice,
    image: str,
    arguments: list[str],
    *,
    namespace: str = "default",
    service_account: str = "",
    hf_secret: str = "",
    checkout: str = "/opt/kd_jax",
    restarts: int = 20,
    spot: bool = False,
) -> dict:
    """The manifest as plain data.

    Args:
        name: of the JobSet and of the subdomain in which its pods find each other.
        image: holds the checkout in the folder `checkout` and an environment with requirements-tpu.txt as `python`.
        arguments: of main.py, one string each; no shell sees them.
        service_account: the Kubernetes account whose identity may use the workdir's bucket; "" for the namespace's own.
        hf_secret: a Secret whose key `token` is a Hugging Face token, for gated weights.
        restarts: how often the JobSet is made again after a preemption or the loss of a host. All else ends it.
    """
    container = {
        "name": "main",
        "image": image,
        "workingDir": checkout,
        "command": ["python", "-u", "main.py", "--distributed"],
        "args": [a.replace("$", "$$") for a in arguments],  # Kubernetes replaces $(NAME) and reads $$ as $
        "resources": {"limits": {"google.com/tpu": slice_.chips_per_host}},
        "securityContext": {"allowPrivilegeEscalation": False},
    }
    if hf_secret:
        container["env"] = [{"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": hf_secret, "key": "token"}}}]
    pod = {
        "restartPolicy": "Never",
        # Else the program is process 1 of its container, on which SIGABRT has no effect: abort() then ends as 139.
        "shareProcessNamespace": True,
        "terminationGracePeriodSeconds": 120,  # for the last checkpoint; a spot node may grant less
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": slice_.accelerator,
            "cloud.google.com/gke-tpu-topology": slice_.shape,
        },
        "containers": [container],
    }
    if service_account:
        pod["serviceAccountName"] = service_account
    if spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        ]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "namespace": namespace,
            # All pods of the job on one node pool, that is on one slice, and no other job beside them.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": _jobset_failures(restarts),
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": _job(slice_.hosts, pod)}}],
        },
    }


def _job(hosts: int, pod: dict) -> dict:
    """One pod a host. A failed pod fails the job: the others could only wait for it."""
    return {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,
        # Both end the job with the reason PodFailurePolicy; every other failure ends it as BackoffLimitExceeded.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "main", "operator": "In", "values": [PREEMPTED, ABANDONED]},
                },
                # `status` is spelled out: JobSet's schema asks for it where Job's has a default.
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }


def _jobset_failures(restarts: int) -> dict:
    return {
        "maxRestarts": restarts,
        "rules": [  # the first that matches counts
            {"name": "preempted", "action": "RestartJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
            {"name": "failed", "action": "FailJobSet"},
        ],
    }
