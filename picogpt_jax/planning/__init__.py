"""Planning: what a run will take, read from its compiled program."""
