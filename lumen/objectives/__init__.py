"""What a model is trained for. An objective is where batches come from and what they cost; the loop is one for all."""
