"""Recipes: the model of one, its steps, and their execution as SQL. Loads without torch."""
