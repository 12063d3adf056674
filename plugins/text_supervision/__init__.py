"""Text supervision: losses that hold soft prompts near hard ones."""
