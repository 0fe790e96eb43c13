"""A save from the vote to the commit: snapshot, staging, and what becomes of them."""
