"""Controllers of the batch size, and the gradient statistics that some of them measure."""
