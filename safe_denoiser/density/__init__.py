"""What a bank says of a noisy latent: kernel density, Gaussian, windows of pictures, and whether to trust distances."""
