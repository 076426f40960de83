"""The algorithm: advantage, batch, loss, update, checkpoint, loop, evaluation, entry point."""
