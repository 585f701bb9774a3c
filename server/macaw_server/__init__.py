"""Macaw's server: programs over HTTP, scheduled on an engine of its own."""
