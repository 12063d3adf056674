from .clip import load  # noqa: F401
