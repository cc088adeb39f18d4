"""Answers that the graders are measured by: one file for each exercise.

    WRONG    what a learner may have done -> {file: {name: body}}; every one must be rejected
    RIGHT    the same for unusual answers that are right; every one must be accepted

Whoever learns alone: these are spoilers, and a pack for a class (make.py --class) leaves them out.
"""
