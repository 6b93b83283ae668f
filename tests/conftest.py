"""What several test files start from."""

from __future__ import annotations

import os

import pytest
import torch

from models.blip import BlipRetrieval
from models.config import BlipConfig
from tests.tiny import TINY, random_model

# The products of tiny models are done before a second thread wakes up; on a busy machine waiting for it costs 50 times more.
torch.set_num_threads(1)


@pytest.fixture
def tiny_config() -> BlipConfig:
    return TINY


@pytest.fixture
def tiny_model() -> BlipRetrieval:
    """Random weights; a new model for each test, so a test may change it."""
    return random_model()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without BLIP_REAL_DATA there is nothing for the `real_data` tests to read: they are deselected, and counted as such."""
    if "BLIP_REAL_DATA" in os.environ:
        return
    wanting = [item for item in items if item.get_closest_marker("real_data")]
    if wanting:
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]
