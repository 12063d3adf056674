"""Files from other people, read without believing them: pickles that run nothing, archives with limits, text for tables."""
