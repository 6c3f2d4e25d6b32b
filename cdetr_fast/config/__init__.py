"""Configuration of a model: its fields and files, the backbone's, and whom to follow (`compat`)."""
