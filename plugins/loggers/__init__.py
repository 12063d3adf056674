"""Logger plugins: where the numbers of a run go besides ``log.txt``."""
