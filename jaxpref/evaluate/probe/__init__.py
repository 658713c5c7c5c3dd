"""Linear reward models on frozen features, for all annotators or for some of them."""
