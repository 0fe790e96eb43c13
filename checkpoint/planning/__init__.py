"""Planning a save: the cuts of arrays over ranks, the part that each rank writes, and the ranks' agreement on it."""
