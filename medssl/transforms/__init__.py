"""Preparation before the cache, random augmentation on the device, and the views made of it."""
