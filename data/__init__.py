"""Floor 2: where tokens come from, in what order, and how they are packed into samples."""
