"""Benchmarks: every saving against the plain way on the same weights and batch, in one process. One module per suite."""
