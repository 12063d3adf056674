"""What a run learned: the words nearest to its prompts, what its experts do, and how far its classes moved."""
