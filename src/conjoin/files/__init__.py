"""Files of models: read without running what they say, and written whole or not at all."""
