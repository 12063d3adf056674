"""The stages of ``tools/build_assets.py``: download, render, image tower, text tower, distillation, packing, report."""
