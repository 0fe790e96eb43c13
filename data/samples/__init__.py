"""Samples of one length: how documents are packed into them, in what order they come, and how sources are blended."""
