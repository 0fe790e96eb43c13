"""Learning-rate schedules, and the learning rate's coupling to a batch that changes."""
