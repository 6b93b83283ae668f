"""What several test files start from."""

from __future__ import annotations

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
