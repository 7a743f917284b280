"""Fixtures that several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for prepared data that lives as long as the test session: the digits are written once."""
    return tmp_path_factory.mktemp("data_cache")
