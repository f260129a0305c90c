"""Nodes that build, save and load negation banks, or sample a reference bank."""
