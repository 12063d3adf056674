"""Installs the plugin; the entry point is how promptmix finds it."""

from setuptools import setup

setup(
    name="promptmix-nearest-router",
    version="0.1.0",
    description="A router that sends an image to the experts whose own hard prompts are nearest to it.",
    py_modules=["promptmix_nearest_router"],
    python_requires=">=3.10",
    install_requires=["promptmix"],
    entry_points={"promptmix": ["nearest_router = promptmix_nearest_router"]},
)
