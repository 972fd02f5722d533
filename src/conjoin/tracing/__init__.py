"""From a model to graphs and back: observed runs, traces, and rewritten forwards."""
