"""What is known of the calls of a model's layers: sites, siblings, hazards."""
