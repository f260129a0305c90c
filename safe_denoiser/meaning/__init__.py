"""What pictures and texts mean, by CLIP: to curate, describe and check sets of pictures."""
