"""What every prompt tuner shares: registration with PEFT, the pool's selection, the head, the output type."""
