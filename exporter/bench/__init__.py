"""Speeds of a bundle, and of peers beside it, each in a process and an environment of its own."""
