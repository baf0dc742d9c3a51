"""What a cluster shall be: the settings that `forge-ray cluster render` fills into manifests.

One dataclass per provider over a shared base. Secrets are no settings: manifests refer to them, or
the cluster makes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from forge_ray import __version__
from forge_ray.errors import ConfigError
from forge_ray.launch.render import machines

SHARED_DISK = "/mnt/forge-ray"
"""Where every node mounts the shared disk; a sweep's folder must lie on it."""

EXAMPLES = ("image", "account", "subnets", "security_group", "nfs", "project", "subnetwork")
"""Settings whose defaults are examples: nobody else's cloud has them."""

_NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_IMAGE = r"[a-z0-9][a-z0-9._:/-]*(:[A-Za-z0-9_][A-Za-z0-9._-]*|@sha256:[0-9a-f]{64})"
_STORE = r"(/|s3://|gs://)[A-Za-z0-9._/-]+"
_NFS = r"[A-Za-z0-9.-]+:/[A-Za-z0-9._/-]*"
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9./_-]*[A-Za-z0-9])?"


@dataclass(kw_only=True)
class ClusterConfig:
    """What every provider's cluster has."""

    name: str = "forge-ray"
    """Of the cluster; other names (roles, pods) begin with it."""
    image: str = f"registry.example.com/forge-ray:{__version__}"
    """Container image of all nodes, built from `cluster/Dockerfile`, with a tag or digest."""
    gpu: str = "L4"
    """GPU, by Ray's name for it."""
    gpus_per_node: int = 1
    """GPUs of a GPU node."""
    min_gpu_nodes: int = 0
    """GPU nodes that stay when idle; 0 costs nothing between sweeps."""
    max_gpu_nodes: int = 8
    """GPU nodes at most: the bound of what the cluster may cost."""
    market: Literal["spot", "on_demand"] = "spot"
    """How GPU nodes are paid. Head and drivers are always on demand."""
    driver_cpus: int = 8
    """CPUs of a driver node: drivers, tokenizers, scoring and data tasks run there. On Kubernetes
    its pod asks for one less, which the node's own services need."""
    max_driver_nodes: int = 4
    """Driver nodes at most; they start with the first job."""
    idle_minutes: int = 10
    """Minutes without work after which a node is given back."""
    store: str = f"{SHARED_DISK}/store"
    """Artifact store: a folder of the shared disk, or an s3:// or gs:// URI."""

    def __post_init__(self) -> None:
        _check("name", self.name, _NAME, "be 1 to 40 of a-z, 0-9 and -, a letter first")
        _check("image", self.image, _IMAGE, "be an image with a tag or digest")
        _check("store", self.store, _STORE, "be an absolute path, s3://… or gs://…")
        if "/../" in f"{self.store}/":
            raise ConfigError(f"store must not climb with '..', got {self.store}. Write it out.")
        if self.image.endswith(":latest"):
            raise ConfigError(
                f"image must name a version, got {self.image}: nodes that join later would run "
                "other code. Tag the image."
            )
        if self.gpu not in machines.KNOWN_GPUS:
            known = ", ".join(machines.KNOWN_GPUS)
            raise ConfigError(f"gpu must be one of {known}, got {self.gpu!r}. Pick one.")
        self._check_numbers()

    def _check_numbers(self) -> None:
        at_least_one = ("gpus_per_node", "max_gpu_nodes", "max_driver_nodes", "idle_minutes")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise it.")
        if not 0 <= self.min_gpu_nodes <= self.max_gpu_nodes:
            raise ConfigError(
                f"min_gpu_nodes must be between 0 and max_gpu_nodes={self.max_gpu_nodes}, got "
                f"{self.min_gpu_nodes}. 0 starts GPU nodes only when a trial needs them."
            )
        if self.driver_cpus not in machines.AWS_CPU:
            sizes = ", ".join(map(str, machines.AWS_CPU))
            raise ConfigError(
                f"driver_cpus must be one of {sizes}, got {self.driver_cpus}. Pick one."
            )

    @property
    def gpu_market(self) -> str:
        """The label `ray.io/market-type` of GPU nodes."""
        return "spot" if self.market == "spot" else "on-demand"

    @property
    def bucket(self) -> str:
        """Bucket of the store; empty where the store is a folder."""
        return self.store.split("/")[2] if "://" in self.store else ""

    @property
    def bucket_prefix(self) -> str:
        """Folder of the store within its bucket."""
        return "/".join(self.store.rstrip("/").split("/")[3:]) if self.bucket else ""


@dataclass(kw_only=True)
class CloudConfig(ClusterConfig):
    """What machines of a cloud need that pods do not."""

    gpu_machines: ClassVar[machines.GpuMachines]
    cpu_machines: ClassVar[machines.CpuMachines]

    access: Literal["tunnel", "direct", "public"] = "tunnel"
    """How `ray up` reaches the head by SSH: `tunnel` through the cloud's own door (Session Manager,
    Identity-Aware Proxy), nodes without public addresses; `direct`, the same from inside the
    network; `public` gives nodes public addresses: your firewall decides who reaches them."""
    nfs: str = ""
    """Shared disk, `host:/path`, mounted on every node."""
    machine_image: str = ""
    """Image of the machines: Docker, NVIDIA driver >= 580, user `ubuntu` with uid 1000."""
    disk_gib: int = 200
    """Boot disk of a node: it holds the container image and Ray's spilled objects."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("nfs", self.nfs, _NFS, "be host:/path")
        _check("machine_image", self.machine_image, r"[A-Za-z0-9:/_.-]+", "be a machine image")
        if self.disk_gib < 100:
            raise ConfigError(
                f"disk_gib must be >= 100, got {self.disk_gib}: a CUDA image alone takes a third. "
                "Raise it."
            )
        machines.gpu_machine(self.gpu_machines, self.gpu, self.gpus_per_node)

    @property
    def gpu_machine(self) -> machines.Machine:
        """Machine of a GPU node."""
        return machines.gpu_machine(self.gpu_machines, self.gpu, self.gpus_per_node)

    @property
    def driver_machine(self) -> machines.Machine:
        """Machine of a driver node."""
        return self.cpu_machines[self.driver_cpus]

    @property
    def head_machine(self) -> machines.Machine:
        """Machine of the head, which schedules and computes nothing."""
        return self.cpu_machines[4]


@dataclass(kw_only=True)
class AwsConfig(CloudConfig):
    """A cluster of `ray up` on AWS."""

    gpu_machines = machines.AWS_GPU
    cpu_machines = machines.AWS_CPU

    region: str = "us-west-2"
    """Region."""
    account: str = "123456789012"
    """Account number, for the policies."""
    subnets: list[str] = field(default_factory=lambda: ["subnet-0123456789abcdef0"])
    """Subnets of one VPC, tried in this order when a zone has no machines left."""
    security_group: str = "sg-0123456789abcdef0"
    """Group of all nodes: all traffic within itself. Without one `ray up` would make a group that
    is open to the world at port 22."""
    nfs: str = "fs-0123456789abcdef0.efs.us-west-2.amazonaws.com:/"
    """EFS or another NFS server."""
    machine_image: str = (
        "resolve:ssm:/aws/service/deeplearning/ami/x86_64/"
        "base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
    )
    """AMI, or `resolve:ssm:PARAMETER` for the newest one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("region", self.region, r"[a-z]{2}(-[a-z]+)+-\d", "be a region such as us-west-2")
        _check("account", self.account, r"\d{12}", "be the 12 digits of an account")
        _check("security_group", self.security_group, r"sg-[0-9a-f]+", "be sg-…")
        if not self.subnets:
            raise ConfigError("subnets must name a subnet, got none. List subnet-… of one VPC.")
        for place, subnet in enumerate(self.subnets):
            _check(f"subnets.{place}", subnet, r"subnet-[0-9a-f]+", "be subnet-…")
        _no_bucket_of("gs://", self.store)


@dataclass(kw_only=True)
class GcpConfig(CloudConfig):
    """A cluster of `ray up` on GCP."""

    gpu_machines = machines.GCP_GPU
    cpu_machines = machines.GCP_CPU

    project: str = "example-project"
    """Project id."""
    region: str = "us-central1"
    """Region."""
    zone: str = "us-central1-a"
    """Zone of all nodes."""
    subnetwork: str = "forge-ray"
    """Subnetwork of the region. Without one `ray up` would give every node a public address."""
    nfs: str = "10.0.0.2:/forge_ray"
    """Filestore or another NFS server."""
    machine_image: str = (
        "projects/deeplearning-platform-release/global/images/family/"
        "common-cu129-ubuntu-2404-nvidia-580"
    )
    """Image or image family of Compute Engine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check("project", self.project, r"[a-z][a-z0-9-]{4,28}[a-z0-9]", "be a project id")
        _check("region", self.region, r"[a-z]+-[a-z]+\d+", "be a region such as us-central1")
        _check("subnetwork", self.subnetwork, _NAME, "be the name of a subnetwork")
        if not re.fullmatch(re.escape(self.region) + "-[a-z]", self.zone):
            raise ConfigError(
                f"zone must lie in region {self.region}, got {self.zone}. Set both, e.g. "
                f"zone={self.region}-a."
            )
        _no_bucket_of("s3://", self.store)


@dataclass(kw_only=True)
class KubeRayConfig(ClusterConfig):
    """A RayCluster and a RayJob for KubeRay >= 1.6."""

    namespace: str = "forge-ray"
    """Namespace of everything."""
    platform: Literal["gke", "eks", "karpenter", "plain"] = "gke"
    """Whose node labels and taints tell spot from on-demand nodes. `plain` selects by neither:
    `market` is then taken on trust."""
    gpu_cpus: int = 7
    """CPUs of a GPU pod; less than the node's, whose own services need some."""
    gpu_memory_gib: int = 26
    """Memory of a GPU pod."""
    claim: str = "forge-ray"
    """PersistentVolumeClaim of the shared disk (ReadWriteMany)."""
    storage_class: str = "standard-rwx"
    """Its storage class; it must offer ReadWriteMany."""
    claim_gib: int = 1024
    """Its size."""
    queue: str = ""
    """LocalQueue of Kueue that admits the RayJob; empty uses no Kueue."""
    identity: dict[str, str] = field(default_factory=dict)
    """Annotations of the pods' service accounts that map them to a cloud identity, e.g.
    `eks.amazonaws.com/role-arn` or `iam.gke.io/gcp-service-account`."""
    operator_namespace: str = "kuberay-operator"
    """Where the KubeRay operator runs; it asks the head how jobs do."""
    monitoring_namespace: str = "monitoring"
    """Where Prometheus runs; only it may scrape the metrics."""
    job_retries: int = 3
    """How often the RayJob starts again on a new cluster; each continues the sweep."""
    max_hours: int = 24
    """After how many hours the RayJob is ended, whatever it does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("namespace", "claim", "operator_namespace", "monitoring_namespace"):
            _check(name, getattr(self, name), r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", "be a name")
        for name in ("storage_class", "queue"):
            if getattr(self, name):
                _check(name, getattr(self, name), _WORD, "be a name, or empty")
        for key, value in self.identity.items():
            _check(f"identity: the key {key}", key, _LABEL, "be an annotation's name")
            _check(f"identity.{key}", value, r"[A-Za-z0-9@:/._+=,-]+", "be one line without spaces")
        for name in ("gpu_cpus", "gpu_memory_gib", "claim_gib", "max_hours"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}. Raise it.")
        if self.job_retries < 0:
            raise ConfigError(f"job_retries must be >= 0, got {self.job_retries}. 0 never retries.")
        self._check_gpu()

    def _check_gpu(self) -> None:
        if self.platform == "gke" and self.gpu not in GKE_GPUS:
            known = ", ".join(GKE_GPUS)
            raise ConfigError(f"gpu must be one of {known} on GKE, got {self.gpu}. Pick one.")
        if self.platform == "eks":
            machines.gpu_machine(machines.AWS_GPU, self.gpu, self.gpus_per_node)

    @property
    def eks_machine(self) -> machines.Machine:
        """Machine of a GPU node on EKS, whose node groups have no label for the GPU alone."""
        return machines.gpu_machine(machines.AWS_GPU, self.gpu, self.gpus_per_node)

    @property
    def notice_s(self) -> int:
        """Seconds between the eviction of a spot pod and its end, less a margin for the kill."""
        return 15 if self.platform == "gke" else 90

    @property
    def driver_pod_cpus(self) -> int:
        """CPUs of a driver pod: with all of its node's it would never be placed."""
        return self.driver_cpus - 1

    @property
    def driver_memory_gib(self) -> int:
        """Memory of a driver pod, four fifths of what clouds give with that many CPUs."""
        return self.driver_cpus * 16 // 5

    @property
    def folder(self) -> str:
        """Of the RayJob's sweep where the store is no folder; else beside its artifacts."""
        return f"{SHARED_DISK}/sweeps/{self.name}" if self.bucket else ""


GKE_GPUS = {
    "T4": "nvidia-tesla-t4",
    "L4": "nvidia-l4",
    "A100": "nvidia-tesla-a100",
    "H100": "nvidia-h100-80gb",
    "H200": "nvidia-h200-141gb",
}
"""GKE's names of GPUs, by Ray's."""

PROVIDERS: dict[str, type[ClusterConfig]] = {
    "aws": AwsConfig,
    "gcp": GcpConfig,
    "kuberay": KubeRayConfig,
}
"""Configurations by provider."""


def _check(path: str, value: str, pattern: str, rule: str) -> None:
    """Everything that enters a manifest is checked: a template would take any text."""
    if not re.fullmatch(pattern, value):
        raise ConfigError(f"{path} must {rule}, got {value!r}. Change the value.")


def _no_bucket_of(scheme: str, store: str) -> None:
    if store.startswith(scheme):
        raise ConfigError(
            f"store must be a folder or this cloud's own bucket, got {store}: the nodes' roles "
            "open no other. Change the store."
        )
