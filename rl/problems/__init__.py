"""The embedded problem set: short Python functions in plain words, generated from a seed."""
