"""Room on the cluster: ask for the nodes of a stage all at once, by kind, and do not wait for them for ever."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import ray
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from tmkd_ray.errors import UserError
from tmkd_ray.stages.progress import say
from tmkd_ray.stages.session import cluster_settings

Bundle = dict[str, float]
"""What one actor or worker asks for: resource to amount."""

NodeKind = Literal["views", "teacher", "train"]

_SILENT_S = 5.0
"""Of waiting; longer is said."""


def node_mark(kind: NodeKind) -> Bundle:
    """Return the sliver of a custom resource that only nodes of this kind have; nothing without marks."""
    return {f"tmkd_{kind}": 0.001} if cluster_settings().node_marks else {}


def bundle(kind: NodeKind, cpus: float, gpus: float) -> Bundle:
    """Return what an actor, worker or task of a stage asks for, on its kind of node."""
    asked = {"CPU": cpus, "GPU": gpus, **node_mark(kind)}
    return {resource: amount for resource, amount in asked.items() if amount}


def nodes_room(kind: NodeKind, cpus: float) -> int:
    """Return how many that ask for so many CPUs the nodes of a kind have room for, busy or not."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    able = [node for node in nodes if node_mark(kind).keys() <= node.keys()]
    return sum(int(node.get("CPU", 0.0) / cpus) for node in able)


def wait_for_room(needed: Sequence[tuple[str, Bundle]], wanted: Sequence[tuple[str, Bundle]] = ()) -> None:
    """Wait until all that a stage needs would find a place at the same time.

    Both lists are demand that an autoscaler sees at once, as a whole; and what it sees is pending, not a
    standing order, so that nothing keeps the nodes when the stage is done. (`request_resources` of Ray's
    autoscaler is one order for the whole cluster, which Ray Data overwrites every 20 s.)

    Args:
        needed: what to wait for, with the part of the configuration that asks for it.
        wanted: asked for too, on a cluster that autoscales, but not waited for.

    Raises:
        UserError: they did not within `cluster.wait_s`.
    """
    settings = cluster_settings()
    asked = [placement_group([bundle for _, bundle in needed])]
    if wanted and settings.autoscaling:
        asked.append(placement_group([bundle for _, bundle in wanted]))
    started = time.monotonic()
    said, pause = False, 0.01
    try:
        while placement_group_table(asked[0])["state"] != "CREATED":
            waited = time.monotonic() - started
            if waited >= settings.wait_s:
                raise UserError(
                    f"the cluster has no room for {_listing(needed)}: waited {waited:.0f} s (cluster.wait_s). "
                    f"Its nodes now: {_nodes()}. Ask for less there, or have nodes with room for it"
                )
            if waited >= _SILENT_S and not said:
                said = True
                say(f"waiting up to {settings.wait_s:.0f} s for room on the cluster: {_listing(needed)}")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)
        if said:
            say(f"room on the cluster after {time.monotonic() - started:.0f} s")
    finally:
        for group in asked:
            remove_placement_group(group)


def _listing(asked: Sequence[tuple[str, Bundle]]) -> str:
    counts = Counter((name, _shown(bundle)) for name, bundle in asked)
    return "; ".join(f"{name}: {count} × {bundle}" for (name, bundle), count in counts.items())


def _nodes() -> str:
    kinds: Counter[str] = Counter()
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            names = [name for name in resources if name in ("CPU", "GPU") or name.startswith("tmkd_")]
            kinds[_shown({name: resources[name] for name in sorted(names)})] += 1
    return "; ".join(f"{count} × {kind}" for kind, count in kinds.items())


def _shown(bundle: Bundle) -> str:
    return "{" + ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items() if amount) + "}"
