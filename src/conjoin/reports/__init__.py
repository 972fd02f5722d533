"""What was found in a model and what it saves, as it is told."""
