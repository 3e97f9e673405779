"""Manifests, cohorts, volumes, the cache of prepared volumes, items, splits and checks."""
