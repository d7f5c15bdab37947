"""Models of other programs: their checkpoints, read, written and upcycled."""
