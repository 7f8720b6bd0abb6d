"""What a knowledge store depends on, so that it is reused exactly when it fits."""

import json
from typing import Any

from tmkd_ray.errors import KnowledgeMismatchError

Fingerprint = dict[str, Any]
"""Nested names to plain values: what a teacher's stored output depends on. Prompts, temperatures, weights and
strategies are not in it: they never invalidate a store."""


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted names to leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Return one line per name whose value differs: `views.edge.strength: store 0.1, config 0.3`."""
    # Through JSON, as the stored one went: tuples are lists.
    old, new = flatten(json.loads(json.dumps(stored))), flatten(json.loads(json.dumps(wanted)))
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            lines.append(f"{name}: store {_short(old.get(name))}, config {_short(new.get(name))}")
    return lines


def check_match(stored: Fingerprint, wanted: Fingerprint, path: str) -> None:
    """Refuse a store of another configuration.

    Raises:
        KnowledgeMismatchError: names every difference.
    """
    lines = differences(stored, wanted)
    if lines:
        listing = "\n".join(f"  {line}" for line in lines)
        raise KnowledgeMismatchError(
            f"the knowledge store at {path} belongs to another configuration:\n{listing}\n"
            "Give knowledge.path another folder, or delete this one to compute it anew"
        )


def _short(value: Any) -> str:
    if value is None:
        return "(none)"
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text
