from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from knowledge_chain import Chain, build_clip, contents, digits_chain, write_with_bank

from tmkd_ray.knowledge.store import KnowledgeStore


@pytest.fixture(scope="session")
def chain() -> Chain:
    return digits_chain(build_clip())


@pytest.fixture(scope="session")
def store(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> KnowledgeStore:
    """A whole store; read it, change nothing."""
    return chain.write(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def originals(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Files of a sound store of each kind."""
    folder = tmp_path_factory.mktemp("sound")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "float32": {"dtype": "float32", "image_format": "lossless"},
        "int8": {"dtype": "int8", "image_format": "jpeg"},
    }
    for kind, changes in kinds.items():
        write_with_bank(chain, folder / kind, **changes)
    return {kind: contents(folder / kind) for kind in kinds}


@pytest.fixture
def sound_store(originals: dict[str, dict[str, bytes]], tmp_path: Path) -> Callable[[str], KnowledgeStore]:
    """Return a store of a kind, for the test to spoil."""

    def copy(kind: str) -> KnowledgeStore:
        for name, content in originals[kind].items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        return KnowledgeStore(str(tmp_path))

    return copy


@pytest.fixture
def copied(store: KnowledgeStore, tmp_path: Path) -> KnowledgeStore:
    """The whole store once more, to be changed."""
    for name, content in contents(Path(store.path)).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return KnowledgeStore(str(tmp_path))
