"""Logger plugins: where the numbers of a run go besides ``log.txt``; each has a node below ``LOGGER`` with its switch."""
