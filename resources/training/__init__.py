"""Training small CLIP models on subsets with open_clip's own code, and measuring them."""
