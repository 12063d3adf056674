"""Build the embedded default (two tiny CLIP models and the emoji packs): ``python tools/build_assets.py all --help``."""

from __future__ import annotations

from assets.main import main

if __name__ == "__main__":
    raise SystemExit(main())
