"""What makes an edit trustworthy: where it changed the picture, and the input's own pixels everywhere else."""
