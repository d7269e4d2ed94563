"""What runs and their jobs are doing now, from their files and one call of squeue.

sources  which runs a folder stands for
queue    the user's jobs as squeue lists them
state    what state a run is in, and why
ranks    what there is to say of single ranks: slow, silent, standing still
row      everything that is shown of a run
table    the rows on a terminal
page     the rows as HTML
"""
