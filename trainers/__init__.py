"""Methods, one paper per file; imported as ``promptmix.trainers``."""

if __name__ == "trainers":
    raise ImportError(
        "promptmix's trainers are imported as `promptmix.trainers`, so that a CoOp checkout's own `trainers/` is left alone"
    )
