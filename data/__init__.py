"""Floor 2: where tokens come from, in what order, and how they are packed into samples.

    documents/    text of files and records
    tokenizing/   text to tokens
    shards/       tokens on disk
    samples/      packing, order, blending

The options of the config group `data` put these together (`nodes.py`, `mixture.py`; their interface is `node.py`). A global
batch of samples (`batch.py`) is dealt to ranks (`assignment.py`) and loaded (`loader.py`).
"""
