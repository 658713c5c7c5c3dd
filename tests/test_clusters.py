"""Detection of the processes of a run from the environment, as JAX does it."""

import os
import socket
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
from jax._src.clusters import ClusterEnv, cloud_tpu_cluster, k8s_cluster

from jaxpref import cli
from jaxpref.errors import InputError
from jaxpref.runtime import mesh
from jaxpref.runtime.mesh import initialize_distributed

ROOT = Path(__file__).resolve().parents[1]
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "tux[03-05],tux9",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI_4 = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "JOB_COMPLETION_INDEX": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,worker-1.svc",
    "TPU_WORKER_ID": "1",
    "TPU_SKIP_MDS_QUERY": "true",
}
SLICES = GKE | {
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
INDEXED_JOB = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "box:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}


@pytest.fixture
def joined(monkeypatch):
    """Records (address, processes, process), as determined by JAX's own detection."""
    for name in list(os.environ):
        if name.startswith(("SLURM", "OMPI", "TPU_", "MEGASCALE", "JAX_C", "JAX_N")):
            monkeypatch.delenv(name)
    found = []

    def initialize(address=None, count=None, index=None, **_):
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            address, count, index, None, None, 1
        )
        # The checks and messages of jax, in its order.
        if address is None:
            raise ValueError("coordinator_address should be defined.")
        if count is None:
            raise ValueError("Number of processes must be defined.")
        found.append((address, count, index))

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    return found


def set_environ(monkeypatch, environ):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)


def on_tpu(monkeypatch):
    """Simulates a machine where JAX finds TPU chips when it is imported."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    nothing = lambda key: None
    monkeypatch.setattr(cloud_tpu_cluster, "get_tpu_env_value_from_metadata", nothing)
    monkeypatch.setattr(mesh, "jax", types.SimpleNamespace(**vars(jax)))
    mesh.jax.config = types.SimpleNamespace(
        jax_platforms="tpu,cpu", update=jax.config.update
    )


@pytest.mark.parametrize(
    ("environ", "tpu", "expected"),
    [
        (SLURM, False, ("tux03:61441", 4, 2)),
        (OPEN_MPI_4, False, ("10.96.0.1:62624", 4, 3)),
        (GKE, True, ("localhost:8482", 2, 1)),
        (SLICES, True, ("localhost:8482", 4, 3)),
        (EXPLICIT, False, ("box:1234", 2, 1)),
        # Explicit settings take precedence.
        (SLURM | EXPLICIT, False, ("box:1234", 2, 1)),
        (GKE | EXPLICIT, True, ("box:1234", 2, 1)),
        # Some launchers set only the address; the rest comes from the cluster.
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "box:1"}, False, ("box:1", 4, 2)),
    ],
)
def test_processes_are_detected(monkeypatch, joined, environ, tpu, expected):
    set_environ(monkeypatch, environ)
    if tpu:
        on_tpu(monkeypatch)
    initialize_distributed()
    assert joined == [expected]


def test_pods_of_an_indexed_job_with_gpus(monkeypatch, joined):
    """As in a JobSet: JAX finds the others through the Kubernetes API."""
    set_environ(monkeypatch, INDEXED_JOB)
    ignore = lambda *_, **__: None
    kubernetes = types.ModuleType("kubernetes")
    kubernetes.config = types.SimpleNamespace(load_incluster_config=ignore)
    kubernetes.client = types.SimpleNamespace(
        CoreV1Api=ignore,
        BatchV1Api=ignore,
        exceptions=types.SimpleNamespace(ApiException=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "kubernetes", kubernetes)
    labels = {"jobset.sigs.k8s.io/jobset-name": "localhost"}
    job = types.SimpleNamespace(
        metadata=types.SimpleNamespace(name="workers", labels=labels),
        spec=types.SimpleNamespace(parallelism=4),
    )
    cluster = k8s_cluster.K8sCluster
    monkeypatch.setattr(cluster, "_job", lambda: job)
    monkeypatch.setattr(cluster, "_pod", lambda: None)
    controller = types.SimpleNamespace(kind="Job")
    monkeypatch.setattr(cluster, "_controller", lambda: controller)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.0.1")
    initialize_distributed()
    assert joined == [("workers-0.localhost:55527", 4, 1)]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_NTASKS": "1"},
        # TPUs that the run does not use, or only describes (`jaxpref plan`).
        GKE | {"JAX_NUM_PROCESSES": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        SLURM | {"JAX_NUM_PROCESSES": "1"},
    ],
)
def test_a_single_process_run(monkeypatch, joined, environ):
    set_environ(monkeypatch, environ)
    initialize_distributed()
    assert joined == []


@pytest.mark.filterwarnings("ignore:.*Kubernetes environment detected")
@pytest.mark.parametrize(
    ("environ", "fragment"),
    [
        # In a shell of salloc, which is not itself one of the tasks.
        ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2, but the processes of the run"),
        # Open MPI 5 does not give the address of the first process.
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2"),
        (INDEXED_JOB, "indexed job"),
        ({"JAX_COORDINATOR_ADDRESS": "box:1"}, "Number of processes must be defined"),
        (EXPLICIT | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID 'one': must be a whole"),
    ],
)
def test_incomplete_environments_are_rejected(monkeypatch, joined, environ, fragment):
    set_environ(monkeypatch, environ)
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(InputError) as error:
        initialize_distributed()
    assert fragment in str(error.value) and "\n" not in str(error.value)


def test_command_line_options(monkeypatch, joined):
    options = "train --coordinator box:1 --processes=3 --process-id 2 --loss nonsense"
    monkeypatch.setattr(sys, "argv", ["jaxpref", *options.split()])
    for name in EXPLICIT:  # removed again after the test
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit):
        cli.main()
    assert joined[0] == ("box:1", 3, 2)
    monkeypatch.setattr(sys, "argv", ["jaxpref", "train", "--processes"])
    with pytest.raises(SystemExit):
        cli.main()


GKE_POD = """
import os, sys
sys.path.insert(0, sys.argv[1])
import jax
from jaxpref.runtime.mesh import initialize_distributed
assert jax.config.jax_platforms == "tpu,cpu"
initialize_distributed()
jax.config.update("jax_platforms", "cpu")  # there is no TPU
jax.config.update("jax_cpu_collectives_implementation", "gloo")
print(jax.process_index(), jax.process_count())
"""


def test_two_pods_of_gke_find_each_other():
    """Everything is real except the chips, whose presence is faked."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environ = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    pods = [
        subprocess.Popen(
            [sys.executable, "-c", GKE_POD, ROOT],
            env=environ
            | GKE
            # Set, so that JAX does not query the metadata server.
            | dict.fromkeys(SLICES.keys() - GKE.keys(), "")
            | {
                "JAX_FORCE_TPU_INIT": "1",
                "JAX_COORDINATOR_PORT": str(port),
                "TPU_WORKER_HOSTNAMES": "localhost,localhost",
                "TPU_WORKER_ID": str(index),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in (0, 1)
    ]
    try:
        outputs = [pod.communicate(timeout=120) for pod in pods]
    finally:
        for pod in pods:
            pod.kill()
    assert [out.split() for out, _ in outputs] == [["0", "2"], ["1", "2"]], outputs
