"""What a step costs: counted operations, memory and time before a run, advice when memory does not suffice."""
