"""What the tests of the bridge to Dassl share."""

from __future__ import annotations

import pytest

from promptmix.dassl import uninstall


@pytest.fixture(autouse=True)
def nobody_installed_it() -> None:
    """Start without what a plugin in Dassl's idiom left behind, when another test loaded it on the command line."""
    uninstall()
