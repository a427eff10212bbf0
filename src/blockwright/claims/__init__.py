"""One small program per method that re-measures its paper's claim."""
