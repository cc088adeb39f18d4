"""The drawn world: pictures of one to three objects with all that is said about them, made on the fly, so that every
claim of the paper can be tested in minutes. It stands in for the paper's data (Sec. 4.1).

    drawing     objects, backgrounds, and how they are drawn                   first
    scenes      scenes at random, and which words no training text says        to know what is held out
    edits       instructions with their exact target                           to see what U2 and U3 are taught
    language    captions, questions, requests; samples by number               to see what the other stages are taught
    judge       reads a picture back by arithmetic, compares an edited one     to know what a figure means
"""
