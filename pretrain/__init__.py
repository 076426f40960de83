"""Makes the model: AR, block-diffusion continual pretraining, SFT."""
