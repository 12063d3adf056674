"""What tests of parts share."""

from __future__ import annotations

import pytest

from promptmix.prompts.roles import Task
from tests.plugins.small import small_task


@pytest.fixture(scope="module")
def task() -> Task:
    return small_task(6)
