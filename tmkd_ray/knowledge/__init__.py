"""The knowledge store: what the frozen teachers say of each image, computed once."""

from tmkd_ray.knowledge.layout import KnowledgeLayout
from tmkd_ray.knowledge.lease import WriterLease
from tmkd_ray.knowledge.store import KnowledgeArrays, KnowledgeStore, Manifest

__all__ = ["KnowledgeArrays", "KnowledgeLayout", "KnowledgeStore", "Manifest", "WriterLease"]
