"""What runs and their jobs are doing now, from their files and one call of squeue."""
