"""Local updating: islands of processes that take steps by themselves, and now and then an outer step together."""
