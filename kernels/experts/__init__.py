"""Products of routed experts with gathering, SwiGLU and gates inside, on Hopper GPUs; and their plain form."""
