"""What a finished run is looked at with: representations, robustness, what teacher and student cost."""
