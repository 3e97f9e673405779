"""Recipes: each function reads as one job."""
