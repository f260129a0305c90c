"""Nodes that learn, save and load unwanted conditions."""
