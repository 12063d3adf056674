"""Runs: one run, protocols of several, sweeps over machines, and the results that they leave."""
