"""Find the architecture."""
