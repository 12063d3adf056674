"""One page about runs: what came out, who was wrong, how sure they were, what was learned, and how to do it again."""
