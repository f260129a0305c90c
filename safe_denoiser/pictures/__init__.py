"""Pictures on disk: which are readable, their pixels, sets of them, and how a set looks."""
