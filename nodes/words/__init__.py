"""The node that takes concepts out of a prompt, and the guards behind it."""
