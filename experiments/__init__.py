"""What was claimed, and how it is reproduced: one file an experiment."""
