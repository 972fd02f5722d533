"""The sandbox: where a forward runs while it is traced, so that all that it reads is noted."""
