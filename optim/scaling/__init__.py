"""Laws of scale: published ones, and fits to runs of one's own."""
