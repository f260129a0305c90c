"""Negation sets as nodes, and the routes by which the page shows and fills them."""
