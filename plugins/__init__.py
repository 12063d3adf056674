"""Built-in plugins by role; imported as ``promptmix.plugins``."""

if __name__ == "plugins":
    raise ImportError("promptmix's plugins are imported as `promptmix.plugins`")
