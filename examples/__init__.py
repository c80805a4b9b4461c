"""Worked examples that run on nothing but the project itself."""
