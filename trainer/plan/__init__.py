"""What a run needs, by arithmetic alone: no configuration, no torch, no machine.

What there is:
    work           what a run does, where, and the plan that comes of it: plain data
    architectures  how the families of decoders differ in what their layers hold
    parameters     a decoder's parameters by name and shape, and which are trained
Bytes:
    memory         of weights, gradients and optimizer, as the engine holds them
    activations    of activations, vocabulary tiles, keys and values
    occupancy      of all that exists at one time on a GPU and on a node
Seconds:
    flops          work of a decoder, and the peak of known devices
    speed          FLOPs and bytes at stated rates
    step_time      a step on a machine, by part
The answer:
    run_plan       a run's plan, and why it cannot be
    search         other ways to run the same work, the cheapest first
For the loop:
    schedule       learning rates as functions of the step
"""
