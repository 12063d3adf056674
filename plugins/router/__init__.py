"""Routers: which experts an image is sent to."""
