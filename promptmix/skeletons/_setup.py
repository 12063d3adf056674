"""Installs the plugin; the entry point is how promptmix finds it."""

from setuptools import setup

setup(
    name="promptmix-my-part",
    version="0.1.0",
    description="A part for promptmix.",
    py_modules=["promptmix_my_part"],
    python_requires=">=3.10",
    install_requires=["promptmix"],
    entry_points={"promptmix": ["my_part = promptmix_my_part"]},
)
