"""Running a recipe's stages, here or on SLURM."""
