"""Rules: each answers a prediction of the model with a correction."""
