"""Checkpoints, tokenizers, caches, the decoder and the training engines. DeepSpeed only here."""
