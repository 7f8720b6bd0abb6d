"""`cluster.yaml` and its kin: what Ray's own validator, autoscaler and a shell can check without a cloud."""

import copy
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from autoscaler_simulation import requested_nodes
from cluster_files import (
    ACCESS,
    ALL_FILES,
    AWS,
    GCP,
    GPUS_PER_NODE,
    ROOT,
    SECRETS,
    documented_placeholders,
    read_yaml,
    used_placeholders,
)
from ray.autoscaler._private.util import prepare_config, validate_config

REMOTE_HOME = "/home/ubuntu"
VIEWS = {"CPU": 1.0, "tmkd_views": 0.001}

# What the clouds say of their machines: CPUs and GPUs.
MACHINES = {
    "c7i.4xlarge": (16, 0),
    "g6.2xlarge": (8, 1),
    "g6.12xlarge": (48, 4),
    "n2-highcpu-16": (16, 0),
    "g2-standard-8": (8, 1),
    "g2-standard-48": (48, 4),
}


@pytest.fixture(params=[AWS, GCP], ids=["aws", "gcp"])
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def cluster(path: Path) -> dict[str, Any]:
    return read_yaml(path)


def workers(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    types = dict(cluster["available_node_types"])
    del types[cluster["head_node_type"]]
    return types


def is_spot(node_config: dict[str, Any]) -> bool:
    """Whether the cloud, not our name for the type, makes it spot."""
    market = node_config.get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or node_config.get("scheduling", {}).get("provisioningModel") == "SPOT"


def without_market(node_config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value for key, value in node_config.items() if key not in ("InstanceMarketOptions", "scheduling")
    }


def commands(cluster: dict[str, Any]) -> list[str]:
    lists = [value for key, value in cluster.items() if key.endswith("_commands")]
    lists += [
        node["initialization_commands"]
        for node in workers(cluster).values()
        if "initialization_commands" in node
    ]
    return [command for some in lists for command in some]


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


@pytest.mark.parametrize("key", ["idle_timeout_minute", "file_mount"])
def test_ray_refuses_a_misspelt_key(cluster: dict[str, Any], key: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=key):
        validate_config(prepare_config({**cluster, key: 10}))


def test_head_runs_no_work(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert head["max_workers"] == 0
    assert not is_spot(head["node_config"])
    (start,) = (command for command in cluster["head_start_ray_commands"] if "ray start" in command)
    assert "--num-cpus=0" in start.split()


def test_workers_come_and_go(cluster: dict[str, Any]) -> None:
    assert cluster["idle_timeout_minutes"] > 0
    assert cluster["provider"]["cache_stopped_nodes"] is False
    for name, node in workers(cluster).items():
        assert node["min_workers"] == 0, name
        assert 0 < node["max_workers"] <= cluster["max_workers"], name


def test_each_stage_has_a_spot_type_and_the_same_on_demand(cluster: dict[str, Any]) -> None:
    marks = [
        mark for node in workers(cluster).values() for mark in node["resources"] if mark.startswith("tmkd_")
    ]
    assert sorted(marks) == sorted([*GPUS_PER_NODE, *GPUS_PER_NODE])
    for mark, gpus in GPUS_PER_NODE.items():
        types = [node for node in workers(cluster).values() if mark in node["resources"]]
        spot, on_demand = sorted(types, key=lambda node: not is_spot(node["node_config"]))
        assert is_spot(spot["node_config"])
        assert not is_spot(on_demand["node_config"])
        assert spot["resources"] == on_demand["resources"]
        assert without_market(spot["node_config"]) == without_market(on_demand["node_config"])
        assert spot["priority"] > on_demand.get("priority", 0)
        assert spot["labels"] == {"ray.io/market-type": "spot"}
        assert on_demand["labels"] == {"ray.io/market-type": "on-demand"}

        machine = spot["node_config"].get("InstanceType") or spot["node_config"]["machineType"]
        resources = spot["resources"]
        assert (resources["CPU"], resources.get("GPU", 0)) == MACHINES[machine]
        assert resources.get("GPU", 0) == gpus
        assert resources[mark] == 1


def test_marks_are_documented() -> None:
    header = AWS.read_text().split("\ncluster_name")[0]
    for mark in GPUS_PER_NODE:
        assert re.search(rf"^#   {mark} ", header, flags=re.MULTILINE)


@pytest.mark.parametrize(("mark", "gpus"), GPUS_PER_NODE.items())
def test_a_marked_task_gets_its_own_kind_of_node(cluster: dict[str, Any], mark: str, gpus: int) -> None:
    demand = {"CPU": 1.0, mark: 0.001} | ({"GPU": 1.0} if gpus else {})
    (spot,) = (name for name, node in workers(cluster).items() if mark in node["resources"] and "spot" in name)
    assert requested_nodes(cluster, demand, count=1) == {spot: 1}


def test_a_pool_grows_at_once(cluster: dict[str, Any]) -> None:
    """40 tasks of one CPU on nodes of 16: three nodes, in the first round."""
    assert requested_nodes(cluster, VIEWS, count=40, rounds=1) == {"views_spot": 3}


def test_no_gpu_node_for_a_task_without_gpu(cluster: dict[str, Any]) -> None:
    assert requested_nodes(cluster, {"CPU": 1.0}, count=20) == {"views_spot": 2}


def test_on_demand_takes_what_spot_has_no_more_room_for(cluster: dict[str, Any]) -> None:
    """13 nodes are asked for, 8 may be spot."""
    assert requested_nodes(cluster, VIEWS, count=200) == {"views_spot": 8, "views_on_demand": 5}


def test_refused_spot_is_asked_for_again_until_its_priority_is_lowered(cluster: dict[str, Any]) -> None:
    """What the comment in cluster.yaml says of Ray; should Ray learn better, that comment is to change."""
    refused = {"views_spot"}
    asked = requested_nodes(cluster, VIEWS, count=40, refused=refused)
    assert set(asked) == refused
    assert asked["views_spot"] > 3

    switched = copy.deepcopy(cluster)
    switched["available_node_types"]["views_spot"]["priority"] = -1
    assert requested_nodes(switched, VIEWS, count=40, refused=refused) == {"views_on_demand": 3}


def test_placeholders_are_documented(path: Path) -> None:
    assert documented_placeholders(path) == used_placeholders(path)
    assert used_placeholders(path)


@pytest.mark.parametrize("file", ALL_FILES, ids=lambda file: file.name)
def test_no_secret(file: Path) -> None:
    assert not SECRETS.search(file.read_text())


@pytest.mark.parametrize(
    "text", ["aws_secret_access_key: x", "password = x", "RAY_AUTH_TOKEN=x", "-----BEGIN RSA PRIVATE KEY-----"]
)
def test_secrets_would_be_found(text: str) -> None:
    assert SECRETS.search(text)


@pytest.mark.parametrize("file", ALL_FILES, ids=lambda file: file.name)
def test_nothing_is_open_to_the_world(file: Path) -> None:
    assert "0.0.0.0" not in file.read_text()
    assert "::/0" not in file.read_text()


def test_aws_nodes_are_in_the_users_group() -> None:
    """Ray makes a group, with ssh open to the world, for any type that names none."""
    cluster = read_yaml(AWS)
    assert "security_group" not in cluster["provider"]
    for name, node in cluster["available_node_types"].items():
        assert node["node_config"]["SecurityGroupIds"] == ["FILL_IN_SECURITY_GROUP"], name
        assert node["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}, name


def test_gcp_nodes_are_in_a_network_that_lets_ssh_in_from_one_place() -> None:
    for name, node in read_yaml(GCP)["available_node_types"].items():
        (interface,) = node["node_config"]["networkInterfaces"]
        assert interface["subnetwork"].endswith("/tmkd"), name
    rules = re.findall(r"firewall-rules create (\S+) .*--source-ranges=(\S+)", GCP.read_text())
    assert rules == [("tmkd-within", "10.10.0.0/20"), ("tmkd-ssh", "YOUR.IP.ADD.RESS/32")]


def test_dashboard_stays_on_the_heads_loopback_and_asks_for_a_token(cluster: dict[str, Any]) -> None:
    assert not [command for command in commands(cluster) if "--dashboard-host" in command]
    assert [command for command in cluster["setup_commands"] if "export RAY_AUTH_MODE=token" in command]
    assert cluster["file_mounts"][f"{REMOTE_HOME}/.ray/auth_token"] == "~/.ray/auth_token"


def test_both_clouds_install_alike() -> None:
    aws, gcp = read_yaml(AWS), read_yaml(GCP)
    same = [
        "setup_commands",
        "file_mounts",
        "rsync_exclude",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    ]
    assert {key: aws[key] for key in same} == {key: gcp[key] for key in same}


def test_commands_are_shell(cluster: dict[str, Any]) -> None:
    for command in commands(cluster):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_setup_installs_this_project_with_its_constraints(cluster: dict[str, Any]) -> None:
    (install,) = (command for command in cluster["setup_commands"] if " ~/tmkd" in command)
    assert install.split()[-3:] == ["--constraint", "~/tmkd/constraints.txt", "~/tmkd"]


def test_paths_of_the_setup_are_mounted_and_exist(cluster: dict[str, Any]) -> None:
    mounts = {remote: local for remote, local in cluster["file_mounts"].items() if not local.startswith("~")}
    for remote, local in mounts.items():
        assert (ROOT / local).exists()
        assert remote == f"{REMOTE_HOME}/tmkd/{local}"
    folders = {str(parent) for remote in mounts for parent in Path(remote).parents}
    named = [path for command in commands(cluster) for path in re.findall(r"~(/tmkd\S*)", command)]
    assert named
    for path in named:
        assert REMOTE_HOME + path in {*mounts, *folders}


def test_what_the_build_reads_is_mounted(cluster: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    read = ["pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]]
    read += [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert set(read) <= set(cluster["file_mounts"].values())


@pytest.fixture(scope="module")
def access() -> dict[str, Any]:
    return read_yaml(ACCESS)


def test_security_group_lets_in_ssh_and_itself(access: dict[str, Any]) -> None:
    resources = access["Resources"]
    (ssh,) = resources["SecurityGroup"]["Properties"]["SecurityGroupIngress"]
    assert ssh == {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": {"Ref": "SshCidr"}}
    group = {"Fn::GetAtt": ["SecurityGroup", "GroupId"]}
    within = resources["WithinTheGroup"]["Properties"]
    assert within == {"GroupId": group, "SourceSecurityGroupId": group, "IpProtocol": "-1"}
    ingress = [name for name, resource in resources.items() if resource["Type"].endswith("Ingress")]
    assert ingress == ["WithinTheGroup"]
    assert access["Outputs"]["SecurityGroup"]["Value"] == group


def test_ssh_range_must_be_given_and_small(access: dict[str, Any]) -> None:
    parameter = access["Parameters"]["SshCidr"]
    assert "Default" not in parameter
    for allowed in ["203.0.113.7/32", "10.1.0.0/16"]:
        assert re.fullmatch(parameter["AllowedPattern"], allowed)
    for refused in ["0.0.0.0/0", "128.0.0.0/1", "10.0.0.0/15", "203.0.113.7", "YOUR.IP.ADD.RESS/32"]:
        assert not re.fullmatch(parameter["AllowedPattern"], refused)


def test_aws_rights_are_the_buckets_and_the_autoscalers(access: dict[str, Any]) -> None:
    resources = access["Resources"]
    bucket = resources["BucketAccess"]["Properties"]
    assert bucket["Roles"] == [{"Ref": "WorkerRole"}, {"Ref": "HeadRole"}]
    for statement in bucket["PolicyDocument"]["Statement"]:
        assert all(re.fullmatch(r"s3:[A-Za-z]+", action) for action in statement["Action"])
        assert statement["Resource"]["Fn::Sub"].split(":::")[1] in ("${Bucket}", "${Bucket}/*")

    assert "Policies" not in resources["WorkerRole"]["Properties"]
    (autoscaler,) = resources["HeadRole"]["Properties"]["Policies"]
    for statement in autoscaler["PolicyDocument"]["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not [action for action in actions if "*" in action]
        if statement["Resource"] == "*":
            assert actions == ["ec2:RunInstances", "ec2:DescribeInstances"]
        if "iam:PassRole" in actions:
            assert statement["Resource"] == {"Fn::GetAtt": ["WorkerRole", "Arn"]}
        if "ec2:TerminateInstances" in actions:
            owner = {"aws:ResourceTag/ray-cluster-name": read_yaml(AWS)["cluster_name"]}
            assert statement["Condition"] == {"StringEquals": owner}


def test_aws_nodes_have_the_profiles_of_the_stack(access: dict[str, Any]) -> None:
    role_of = {
        resource["Properties"]["InstanceProfileName"]: resource["Properties"]["Roles"]
        for resource in access["Resources"].values()
        if resource["Type"] == "AWS::IAM::InstanceProfile"
    }
    cluster = read_yaml(AWS)
    for name, node in cluster["available_node_types"].items():
        role = "HeadRole" if name == cluster["head_node_type"] else "WorkerRole"
        assert role_of[node["node_config"]["IamInstanceProfile"]["Name"]] == [{"Ref": role}]


def test_stack_is_what_cloudformation_reads() -> None:
    """It knows no YAML anchors, and may garble what is not ASCII."""
    text = ACCESS.read_text()
    assert text.isascii()
    assert not [event for event in yaml.parse(text) if isinstance(event, yaml.AliasEvent)]
