"""``python -m promptmix``: the command line, also for ``torchrun -m promptmix train``."""

import sys

from promptmix.cli import main

if __name__ == "__main__":
    sys.exit(main())
