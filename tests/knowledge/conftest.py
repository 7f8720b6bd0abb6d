import pytest
from knowledge_chain import Chain, build_clip, digits_chain

from tmkd_ray.knowledge.store import KnowledgeStore


@pytest.fixture(scope="session")
def chain() -> Chain:
    return digits_chain(build_clip())


@pytest.fixture(scope="session")
def store(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> KnowledgeStore:
    """A whole store; read it, change nothing."""
    return chain.write(tmp_path_factory.mktemp("store"))
