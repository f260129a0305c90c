"""Guards of prompts: embeddings without the concepts that must not be asked for."""
