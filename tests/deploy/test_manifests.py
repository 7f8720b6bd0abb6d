"""deploy/kuberay and deploy/Dockerfile: checked by a schema of the custom resources and by Ray's own reader."""

import copy
import inspect
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from autoscaler_simulation import requested_nodes
from cluster_files import (
    DOCKERFILE,
    DOCKERIGNORE,
    GPUS_PER_NODE,
    RAY_CLUSTER,
    RAY_JOB,
    ROOT,
    documented_placeholders,
    pinned_versions,
    read_yaml,
    used_placeholders,
)
from ray.autoscaler._private import constants
from ray.autoscaler._private.kuberay import autoscaling_config
from ray.autoscaler.v2.instance_manager import config as instance_config

from tmkd_ray.config_reading import read_config

SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
IN_IMAGE = "/home/ray/tmkd"
VIEWS = {"CPU": 1.0, "tmkd_views": 0.001}


@pytest.fixture
def account() -> dict[str, Any]:
    return next(yaml.safe_load_all(RAY_CLUSTER.read_text()))


@pytest.fixture
def cluster() -> dict[str, Any]:
    _, cluster = yaml.safe_load_all(RAY_CLUSTER.read_text())
    return cluster


@pytest.fixture
def job() -> dict[str, Any]:
    return read_yaml(RAY_JOB)


@pytest.fixture
def node_types(cluster: dict[str, Any]) -> dict[str, Any]:
    return autoscaler_config(cluster)["available_node_types"]


def autoscaler_config(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return what the autoscaler beside the head makes of the resource; it checks it by Ray's schema."""
    in_kubernetes = {**cluster, "metadata": {**cluster["metadata"], "namespace": "default"}}
    return autoscaling_config._derive_autoscaling_config_from_ray_cr(in_kubernetes)


def pods(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    head, workers = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    return {"head": head["template"]["spec"]} | {
        group["groupName"]: group["template"]["spec"] for group in workers
    }


def test_schema_accepts_the_manifests(
    account: dict[str, Any], cluster: dict[str, Any], job: dict[str, Any]
) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for manifest in (account, cluster, job):
        jsonschema.Draft202012Validator(SCHEMA).validate(manifest)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (["spec", "rayVersions"], "2.60.0"),
        (["spec", "autoscalerOptions", "version"], "v3"),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "workerGroupSpecs", 0, "replica"], 0),
        (["spec", "workerGroupSpecs", 0, "maxReplicas"], "8"),
        (
            ["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "cpu"],
            14,
        ),
        (
            ["spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "resources", "limits", "gpu"],
            "1",
        ),
    ],
)
def test_schema_refuses_mistakes(cluster: dict[str, Any], where: list[str | int], value: object) -> None:
    manifest = copy.deepcopy(cluster)
    part: Any = manifest
    for key in where[:-1]:
        part = part[key]
    part[where[-1]] = value
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(manifest)


def test_head_runs_no_work(node_types: dict[str, Any]) -> None:
    head = node_types["headgroup"]["resources"]
    assert head["CPU"] == 0
    assert set(head) == {"CPU", "memory"}


def test_workers_come_and_go(cluster: dict[str, Any], node_types: dict[str, Any]) -> None:
    assert cluster["spec"]["enableInTreeAutoscaling"] is True
    assert cluster["spec"]["autoscalerOptions"]["idleTimeoutSeconds"] > 0
    for name, node in node_types.items():
        assert node["min_workers"] == 0
        assert (node["max_workers"] == 0) == (name == "headgroup")


def test_each_stage_has_a_spot_group_and_the_same_on_demand(
    cluster: dict[str, Any], node_types: dict[str, Any]
) -> None:
    assert len(node_types) == 1 + 2 * len(GPUS_PER_NODE)
    for mark, gpus in GPUS_PER_NODE.items():
        stage = mark.removeprefix("tmkd_")
        spot, on_demand = node_types[f"{stage}-spot"], node_types[f"{stage}-on-demand"]
        assert spot["resources"] == on_demand["resources"]
        assert spot["resources"][mark] == 1
        assert spot["resources"].get("GPU", 0) == gpus
        assert spot["priority"] > on_demand.get("priority", 0)
        for market, node in {"spot": spot, "on-demand": on_demand}.items():
            assert node["labels"] == {"ray.io/market-type": market}
            pod = pods(cluster)[f"{stage}-{market}"]
            assert pod["nodeSelector"] == {"karpenter.sh/capacity-type": market}
            assert ("tolerations" in pod) == (gpus > 0)


def test_pods_get_what_they_are_counted_for(cluster: dict[str, Any]) -> None:
    """Limits above requests would let a node be shared by more than it can hold."""
    for pod in pods(cluster).values():
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]


@pytest.mark.parametrize(("mark", "gpus"), GPUS_PER_NODE.items())
def test_a_marked_task_gets_its_own_kind_of_pod(cluster: dict[str, Any], mark: str, gpus: int) -> None:
    demand = {"CPU": 1.0, mark: 0.001} | ({"GPU": 1.0} if gpus else {})
    expected = {f"{mark.removeprefix('tmkd_')}-spot": 1}
    assert requested_nodes(autoscaler_config(cluster), demand, count=1) == expected


def test_on_demand_pods_when_spot_pods_wait_too_long(cluster: dict[str, Any]) -> None:
    config = autoscaler_config(cluster)
    assert requested_nodes(config, VIEWS, count=40, stuck={"views-spot"}) == {
        "views-spot": 3,
        "views-on-demand": 3,
    }


def test_autoscaler_reads_how_long_spot_pods_may_wait(cluster: dict[str, Any]) -> None:
    read_by_ray = inspect.getsource(instance_config) + inspect.getsource(constants)
    settings = cluster["spec"]["autoscalerOptions"]["env"]
    assert len(settings) == 2
    for setting in settings:
        assert f'"{setting["name"]}"' in read_by_ray
        assert setting["value"] == "600"  # the 10 minutes of the comment


def test_only_the_head_may_scale_the_cluster(account: dict[str, Any], cluster: dict[str, Any]) -> None:
    for name, pod in pods(cluster).items():
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod.get("automountServiceAccountToken", True) == (name == "head")


def test_nothing_is_reachable_from_outside_or_without_token(cluster: dict[str, Any]) -> None:
    assert cluster["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["spec"]["authOptions"] == {"mode": "token"}


def test_pods_run_without_privileges(cluster: dict[str, Any]) -> None:
    for pod in pods(cluster).values():
        assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
    (user,) = re.findall(r"^USER (.*)$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert int(user) > 0


def test_versions_are_those_of_the_constraints(cluster: dict[str, Any]) -> None:
    ray = pinned_versions()["ray"]
    (python,) = re.findall(r"^FROM python:(\d+\.\d+)-", DOCKERFILE.read_text(), flags=re.MULTILINE)
    image = f"tmkd-ray:ray{ray}-py{python.replace('.', '')}"
    assert cluster["spec"]["rayVersion"] == ray
    images = {container["image"] for pod in pods(cluster).values() for container in pod["containers"]}
    assert images == {f"FILL_IN_REGISTRY/{image}"}
    assert set(re.findall(r"REGISTRY/(\S+)", DOCKERFILE.read_text())) == {image}

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest, below = re.findall(r"3\.(\d+)", project["requires-python"])
    assert int(lowest) <= int(python.split(".")[1]) < int(below)


@pytest.mark.parametrize("path", [RAY_CLUSTER, RAY_JOB], ids=lambda path: path.name)
def test_placeholders_are_documented(path: Path) -> None:
    assert documented_placeholders(path) == used_placeholders(path)
    assert used_placeholders(path)


def copied_into_image() -> set[str]:
    """Return what the Dockerfile copies, which all lies at the same place below its working directory."""
    sources: set[str] = set()
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(), flags=re.MULTILINE):
        *some, target = line.split()
        assert target == "./" or [target] == some
        sources.update(some)
    return sources


def test_image_is_built_of_what_is_here_and_needed() -> None:
    text = DOCKERFILE.read_text()
    assert re.findall(r"^WORKDIR (.*)$", text, flags=re.MULTILINE) == [IN_IMAGE]
    for source in copied_into_image():
        assert (ROOT / source).exists()
    ignore, *patterns = [line for line in DOCKERIGNORE.read_text().splitlines() if not line.startswith("#")]
    assert ignore == "*"
    assert {pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")} == copied_into_image()
    first_install = text.index("pip install")
    assert text[first_install:].startswith("pip install --no-cache-dir --constraint constraints.txt .")


def test_job_runs_on_the_cluster(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


def test_job_starts_a_pipeline_with_settings_that_exist(job: dict[str, Any]) -> None:
    python, script, option, config, *overrides = shlex.split(job["spec"]["entrypoint"])
    assert (python, option) == ("python", "--config")
    here = {}
    for path in (script, config):
        relative = Path(path).relative_to(IN_IMAGE)
        assert relative.parts[0] in copied_into_image()
        here[path] = ROOT / relative
        assert here[path].is_file()
    assert overrides
    assert read_config(str(here[config]), overrides).output == "s3://FILL_IN_BUCKET/runs"
