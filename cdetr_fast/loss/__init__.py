"""Training criterion. Data passes labels -> `targets` -> `assignment` -> `criterion`."""
