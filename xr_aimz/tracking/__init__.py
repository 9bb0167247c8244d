"""What is logged of a fit: rooms that make it from a Fit, and rooms that send it to MLflow."""
