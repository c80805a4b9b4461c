"""One module per kind of score: its settings, columns, checks and asset."""
