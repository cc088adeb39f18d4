"""What the graders ask: one file for each exercise, named after its number.

    TITLE, MINUTES    what it is about, how long it takes
    CUT               file -> names of what is taken out (exercises/cut.py)
    ABOUT             what is to be filled in, where docstrings do not say it
    PREDICT           three questions, to be answered before any code runs
    ANSWERS           what is right, shown once all claims hold; exercise 10 has a SHEET in its place
    CLAIMS            functions (own, real): `own` is the project with the learner's files, `real` without; the first
                      line of the docstring is the claim; they raise `tools.Wrong` with what is the matter
    fingerprint       (version) -> {name: tensors}: by it a mistake that is known is told by its name (answers/)
    picture           optional: (own, path) draws what can now be seen
"""
