"""Training: recipes, the run and its checkpoints, the loops and their losses."""
