"""What compilers make of a training step, on hardware that need not be here."""
