"""Where this package meets others; nothing outside of this folder knows of transformers."""
