"""Prompts: the roles of a method, the learner that composes them, and the trainer that all methods extend."""
