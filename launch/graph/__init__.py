"""Pipelines: stages as a graph of steps, from conf/pipeline to run folders."""
