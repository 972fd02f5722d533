"""From a model to the calls of its layers: by symbolic tracing, and by observing a run."""
