"""What ``kuroshio doctor`` looks at: facts are gathered and judged apart.

``gather`` asks the machine, ``judge`` is pure: facts to findings.

This machine, a module a topic:
    machine       all of them, one after the other
    packages      Python and its packages against setup.cfg and constraints.txt
    devices       GPUs, driver, CUDA, compilers, DeepSpeed's ops
    scheduler     Slurm: commands, partition, account, limits against the profile
    files, quota  folders: writable, quick, with room, links and locks; what may still be written
    network       names, interfaces, ports
    artefacts     what a run reads: models, tokenizers, token stores
    probe         questions that need torch or a tokenizer, in a process of their own
Several nodes:
    job           their job: submitted, waited for, read
    rank_plan     what its ranks are asked to do, and the place of a node's ranks in it
    rank          one rank: looks, measures, meets the others, measures with them
    rates         how fast a device computes and moves memory
    meeting       ranks find each other, and go on without those who stay away
    rounds        who measures with whom
    allreduce     bandwidth and latency among a few ranks
    report        what the ranks say of themselves, as lines
    verdict       from their reports to findings
    link_verdict  from measured links to the slow one
    median        comparison with what most of the machine does
Both:
    finding       one result: good, doubtful or wrong, and what to do
    table         findings for people
    command       asking a program of the machine
"""
