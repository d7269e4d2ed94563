"""Pipelines: stages as a graph of steps, from conf/pipeline to run folders.

definition  the file and the command line's words → steps with their parents
words       the words: of the file, for all runs, for one step
check       every run composed and checked before the first step
lineage     what a step was made from: recorded, compared, complete or not
progress    what was begun as something else, what need not be done again
state       DIR/pipeline.json: every step and what became of it
work        the steps that are no runs: a tokenizer, an export
jobs        ``kuroshio submit pipeline=NAME``; ``launch.pipeline`` runs one here
"""
