"""Token shards, the files that tokens are kept in: their manifest, writer and reader, and copies from an object store."""
