"""The mathematics of masked diffusion: tensors in, tensors out. No files, no transformers."""
