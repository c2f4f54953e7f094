"""Training data: records read from files, packed into rows, made into batches."""
