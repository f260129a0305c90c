"""A diffusion model small enough to train, ship and test on a CPU: 32 x 32 digits, SD3 and TAESD file formats."""
