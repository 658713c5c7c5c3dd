"""What a model says of a batch, and the reference's scores, computed once."""
