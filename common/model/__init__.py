"""A model: its files, its configuration, its weights, its layers."""
