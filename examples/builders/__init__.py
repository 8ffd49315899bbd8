"""Recipes of the example cases, one module per case."""
