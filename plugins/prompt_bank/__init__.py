"""Prompt banks: where the prompts of the experts come from."""
