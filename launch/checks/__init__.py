"""What ``kuroshio doctor`` looks at: one module a topic, each of facts and what they mean.

``gather`` asks the machine, ``judge`` is pure: facts to findings.
"""
