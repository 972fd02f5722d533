"""Files of models: loaded without running code that they name, and written whole or not at all."""
