"""Floor 1: kernels, each with its plain form and the reason why it can't be used. They name no rank and no model."""
