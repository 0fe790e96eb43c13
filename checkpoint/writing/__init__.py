"""The writer process: bytes from shared memory to a disk or an object store. No torch."""
