"""Installs the plugin; the entry point is how promptmix finds it."""

from setuptools import setup

setup(
    name="promptmix-task-residual",
    version="0.1.0",
    description="TaskRes (Yu et al., CVPR 2023) as a trainer, and a data set of drawn shapes to try it on.",
    py_modules=["promptmix_task_residual"],
    python_requires=">=3.10",
    install_requires=["promptmix"],
    entry_points={"promptmix": ["task_residual = promptmix_task_residual"]},
)
