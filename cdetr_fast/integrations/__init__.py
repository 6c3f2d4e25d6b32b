"""Integration with transformers: its models optimized, patched and given our attention."""
