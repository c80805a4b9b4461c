"""Recipes: their model, their steps, and their execution as SQL. Loads without torch."""
