"""You need not read this to understand the method. Open it when a run does not do what you want; README.md beside this
file says how runs go on, where they run, and what a run folder holds.

    command      mistakes that end in one line, files that are never half      to add a command
    flags        the configuration as flags                                    to add a flag
    devices      device, precision, torch's settings                           to run on another machine
    training     a stage in progress: what trains, its optimizer, its file     with train.py
    processes    DDP, FSDP2, signals                                           to run on several GPUs
    run_folder   what a run folder holds, whether it fits, the model in it     to load a run
    checkpoints  files of stages, finished and in progress                     when a file is refused
    replay       a step that is not finite, computed again                     when a loss is nan
    pictures     the report of a run                                           to draw something else
"""
