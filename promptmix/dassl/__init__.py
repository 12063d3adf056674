"""Dassl's import surface on promptmix's engine, and promptmix's trainers in a real Dassl.

* ``install()``: ``import dassl`` gives this package where no real Dassl is installed, so that trainers and data sets written
  for Dassl run unchanged.
* ``register(cfg)``: in a program with a real Dassl, puts promptmix's trainers into its registry and their keys into its config.
* ``patch_torch()``: gives a real Dassl back what PyTorch has dropped since.

The modules below have Dassl's names (``promptmix.dassl.engine``, ``promptmix.dassl.data.datasets``, ...) and say what they lack.
"""

from __future__ import annotations

from promptmix.dassl.bridge import register
from promptmix.dassl.importing import install, installed, uninstall
from promptmix.dassl.patches import patch_torch

__all__ = ["install", "installed", "patch_torch", "register", "uninstall"]
