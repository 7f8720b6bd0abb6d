"""Ray's own autoscaler, before a cloud that is made up: which nodes does it launch for what is asked?"""

import time
from collections import Counter
from typing import Any

from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, InstanceReconcileConfig
from ray.autoscaler.v2.instance_manager.instance_manager import InstanceManager
from ray.autoscaler.v2.instance_manager.instance_storage import InstanceStorage
from ray.autoscaler.v2.instance_manager.node_provider import (
    CloudInstance,
    CloudInstanceProviderError,
    ICloudInstanceProvider,
    LaunchNodeError,
)
from ray.autoscaler.v2.instance_manager.reconciler import Reconciler
from ray.autoscaler.v2.instance_manager.storage import InMemoryStorage
from ray.autoscaler.v2.instance_manager.subscribers.cloud_instance_updater import CloudInstanceUpdater
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceState, NodeStatus
from ray.core.generated.instance_manager_pb2 import NodeKind


class _Cloud(ICloudInstanceProvider):
    """Launches what is asked at once, but refuses some node types, as EC2 does without spot capacity."""

    def __init__(self, head_type: str, refused: set[str]) -> None:
        self._refused = refused
        self._errors: list[CloudInstanceProviderError] = []
        self._running = {"head": CloudInstance("head", head_type, NodeKind.HEAD, True)}
        self.requested: Counter[str] = Counter()

    def get_non_terminated(self) -> dict[str, CloudInstance]:
        return dict(self._running)

    def launch(self, shape: dict[str, int], request_id: str) -> None:
        for node_type, count in shape.items():
            if node_type in self._refused:
                self._errors.append(LaunchNodeError(node_type, count, request_id, time.time_ns()))
            for _ in range(count):
                name = f"{node_type}-{self.requested[node_type]}"
                self.requested[node_type] += 1
                if node_type not in self._refused:
                    self._running[name] = CloudInstance(name, node_type, NodeKind.WORKER, True)

    def terminate(self, ids: list[str], request_id: str) -> None:
        for name in ids:
            del self._running[name]

    def poll_errors(self) -> list[CloudInstanceProviderError]:
        errors, self._errors = self._errors, []
        return errors


class _ImpatientConfig(AutoscalingConfig):
    """Gives up at once on a node that has not joined the cluster, instead of after minutes."""

    def get_instance_reconcile_config(self) -> InstanceReconcileConfig:
        return InstanceReconcileConfig(allocate_status_timeout_s=0)


def requested_nodes(
    config: dict[str, Any],
    demand: dict[str, float],
    count: int,
    refused: set[str] | None = None,
    stuck: set[str] | None = None,
    rounds: int = 6,
) -> Counter[str]:
    """Return how many nodes of each type are requested of the cloud over some rounds of the autoscaler.

    Args:
        config: a cluster's configuration, as Ray's autoscaler reads it.
        demand: what one task asks for.
        count: number of such tasks, none of which ever ends.
        refused: node types whose launch fails.
        stuck: node types that are launched and never join the cluster, as pods that wait for a node.
        rounds: the autoscaler makes one every few seconds.
    """
    settings = (_ImpatientConfig if stuck else AutoscalingConfig)(config, skip_content_hash=True)
    cloud = _Cloud(settings.get_head_node_type(), refused or set())
    monitor = CloudResourceMonitor()
    instances = InstanceManager(
        InstanceStorage("cluster", InMemoryStorage()), [CloudInstanceUpdater(cloud), monitor]
    )
    state = ClusterResourceState(cluster_resource_state_version=1)
    request = ResourceRequestUtil.make(demand)
    state.pending_resource_requests.extend(ResourceRequestUtil.group_by_count([request] * count))
    joined: set[str] = set()
    for _ in range(rounds):
        for name, machine in cloud.get_non_terminated().items():
            if name in joined or machine.node_type in (stuck or set()):
                continue
            joined.add(name)
            resources = settings.get_node_resources(machine.node_type)
            if machine.node_kind == NodeKind.HEAD:
                resources["node:__internal_head__"] = 1.0
            state.node_states.add(
                node_id=len(joined).to_bytes(28, "big"),
                instance_id=name,
                ray_node_type_name=machine.node_type,
                status=NodeStatus.RUNNING,
                total_resources=resources,
                available_resources=resources,
            )
        Reconciler.reconcile(
            instance_manager=instances,
            scheduler=ResourceDemandScheduler(),
            cloud_provider=cloud,
            cloud_resource_monitor=monitor,
            ray_cluster_resource_state=state,
            non_terminated_cloud_instances=cloud.get_non_terminated(),
            autoscaling_config=settings,
            cloud_provider_errors=cloud.poll_errors(),
        )
    return cloud.requested
