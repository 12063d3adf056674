"""A third-party plugin package, installed by tests/test_plugins.py."""

from setuptools import setup

setup(
    name="promptmix-first-expert",
    version="0.1",
    packages=["promptmix_first_expert"],
    entry_points={"promptmix": ["first_expert = promptmix_first_expert"]},
)
