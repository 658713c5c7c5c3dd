"""What a run minimizes: losses with state, and what is learned beside the model."""
