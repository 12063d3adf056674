"""Distillers: losses that teach the soft prompts from hard-prompt teachers."""
