"""Where each folder of the checkout goes in the installed package; everything else about it is in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

# Readers meet the methods at the top of the checkout, but an installed `trainers` would clash with the folder of that
# name in every CoOp checkout: these rooms install inside promptmix.
ROOMS = ("trainers", "plugins", "configs")

# What is not Python and must come along, by suffix: YAML trees, model descriptions and weights, pictures, splits, licences.
DATA = [
    "*.yaml",
    "*.html",
    "*.json",
    "*.csv",
    "*.safetensors",
    "*.zip",
    "*.gz",
    "*.txt",
    "*.md",
    "LICENSE*",
    "NOTICE*",
    "py.typed",
]


def room_packages() -> list[str]:
    """Return every package of the rooms under its installed name (``promptmix.plugins.router``)."""
    found = [package for room in ROOMS for package in find_packages(include=[room, f"{room}.*"])]
    return [f"promptmix.{package}" for package in found]


setup(
    packages=find_packages(include=["promptmix", "promptmix.*"]) + room_packages(),
    package_dir={"promptmix": "promptmix"} | {f"promptmix.{room}": room for room in ROOMS},
    package_data={"promptmix": [f"**/{pattern}" for pattern in DATA], "promptmix.configs": ["**/*.yaml"]},
    include_package_data=False,
)
