"""The shipped tiny world of photographs: a diffusion model, its autoencoder and an independent judge."""
