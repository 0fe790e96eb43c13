"""Floor 4: the universal checkpoint: named global arrays, written as boxes, read as any other boxes."""
