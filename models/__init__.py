"""Floor 2: model definitions, free of parallelism."""
