"""Teachers: what gives the signals that a student learns from, asked at every step or once and stored."""
