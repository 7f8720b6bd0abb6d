"""The files that describe clusters, read the way their users and programs read them."""

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
AWS = ROOT / "cluster.yaml"
GCP = ROOT / "deploy/cluster-gcp.yaml"
ACCESS = ROOT / "deploy/aws-access.yaml"
RAY_CLUSTER = ROOT / "deploy/kuberay/raycluster.yaml"
RAY_JOB = ROOT / "deploy/kuberay/rayjob.yaml"
DOCKERFILE = ROOT / "deploy/Dockerfile"
DOCKERIGNORE = ROOT / ".dockerignore"
ALL_FILES = [AWS, GCP, ACCESS, RAY_CLUSTER, RAY_JOB, DOCKERFILE, DOCKERIGNORE]

GPUS_PER_NODE = {"tmkd_views": 0, "tmkd_teacher": 1, "tmkd_train": 4}
"""The mark of each stage's nodes, and how many GPUs one has."""

SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY|hf_[A-Za-z0-9]{20}"
    r"|(?i:password|secret_?access_?key|session_?token|api_?key|ray_auth_token)\W*[=:]"
)


def read_yaml(path: Path) -> Any:
    """Return a file's one YAML document."""
    return yaml.safe_load(path.read_text())


def documented_placeholders(path: Path) -> set[str]:
    """Return what the comment at the top of a file asks its user to fill in."""
    header = re.match(r"(#.*\n)+", path.read_text())
    assert header
    return set(re.findall(r"^#   (FILL_IN_\w+): ", header.group(), flags=re.MULTILINE))


def used_placeholders(path: Path) -> set[str]:
    """Return the placeholders in what a program reads of a YAML file: the values, not the comments."""
    values = repr(list(yaml.safe_load_all(path.read_text())))
    return set(re.findall(r"FILL_IN_[A-Z_]*[A-Z]", values))


def pinned_versions() -> dict[str, str]:
    """Return the version of each package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))
