"""Text for the app: the embedded corpus, data modules and models."""
