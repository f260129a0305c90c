"""Nodes that ask what pictures mean: load CLIP, curate, describe, check."""
