"""Floor 2: optimizers, learning-rate schedules, batch-size controllers, all functions of plain numbers and tensors."""
