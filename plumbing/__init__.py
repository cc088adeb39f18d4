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

import os

# How many turns OpenMP's threads wait awake for one another before they sleep: read when torch is loaded, so before it.
# Asleep they take longer to wake (a run alone takes 3 to 10 % longer); awake they keep a core from those they wait for,
# once others want the cores too: of two runs on two cores a step of P1 took 90 times as long as alone, now 2.5 times.
os.environ.setdefault("GOMP_SPINCOUNT", "1200")
