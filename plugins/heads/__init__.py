"""Heads: how image and text features become class scores."""
