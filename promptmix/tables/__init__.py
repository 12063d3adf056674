"""Tables of results, published numbers beside them, and pictures."""
