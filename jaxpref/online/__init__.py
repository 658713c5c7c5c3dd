"""Training on a model's own answers: rounds of commands, and sampled batches."""
