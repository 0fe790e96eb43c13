"""Reading any boxes out of a checkpoint, and comparing them."""
