"""Shipped YAML files, as package data of ``promptmix.configs``."""

if __name__ == "configs":
    raise ImportError("promptmix's configs are package data of `promptmix.configs`")
