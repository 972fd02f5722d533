"""Reports: how it is told what was found in a model and what that saves."""
