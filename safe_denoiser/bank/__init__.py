"""Banks: the latents of a set of pictures, how they are made, searched, saved and cached."""
