"""What ``kuroshio verify`` checks of a run's folder.

check        one result, and what all of them are worth
records      what the run wrote down: config, lives, lease, figures
checkpoints  committed ones against their manifests; what unfinished saves left
inputs       what the run was made of, as its newest checkpoint recorded it
parents      runs that it was made of
exports      what `kuroshio export` wrote
replay       steps done again beside the run; which ones says replay_plan
replay_plan  checkpoint, steps and ranks of a replay
sameness     whether two records, or two checkpoints, of the same step say the same
"""
