"""What a condition means to the diffusion model: measured, learned from pictures, saved, or found among phrases."""
