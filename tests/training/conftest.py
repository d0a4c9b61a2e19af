from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from diffussm.data.store import LocalStore


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """One rank, with its groups."""
    place = tmp_path_factory.mktemp("rendezvous") / "store"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    groups = {"control": dist.new_group(backend="gloo"), "saving": dist.new_group(backend="gloo")}
    yield SimpleNamespace(rank=0, world_size=1, is_main=True, host="here", from_main=lambda f: f(), **groups)
    dist.destroy_process_group()


@pytest.fixture
def store(tmp_path) -> LocalStore:
    return LocalStore(tmp_path / "checkpoints")
