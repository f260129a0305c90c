"""What happens at each step of a sampler, and the nodes that patch a model for it."""
