"""Ten exercises whose graders are measured, and the paper's claims, answered with seeds. README.md beside this file.

    make, run, grade      a learner's copy with bodies taken out; scripts that run on it; whether it is right
    share, pool           one run for a class; a class's figures as one picture and a verdict
    expected              trains the short arms of exercises 8 to 10: what a class should expect, results/class.json
    page                  `python sample.py page`: a run, to explore in a browser
    probes                facts read off f_v, z_s and z_p by ridge regression
    claims                trains what is missing of the claims study, measures, writes results/claims.json
    cut, judge            taking bodies out by name, versions side by side; claims decided one by one
    checks/, answers/     what the graders ask; wrong and right answers that the graders are measured by (spoilers)
"""
