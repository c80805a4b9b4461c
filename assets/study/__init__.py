"""A page that compares all scores and subsets of a project."""
