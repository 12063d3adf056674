"""Selectors of the protocol ``active``: which pictures are labelled next."""
