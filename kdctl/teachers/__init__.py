"""Teachers: what gives the signals that a student learns from."""
