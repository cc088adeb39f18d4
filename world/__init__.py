"""The drawn world: pictures of one to three objects with all that is said about them, made on the fly, so that every claim of the
paper can be tested in minutes. It stands in for the paper's data (Sec. 4.1).

    drawing     objects, backgrounds, scenes, and how they are drawn           first
    language    captions, questions, requests, edits; samples by number        to see what a stage is taught
    judge       reads a picture back by arithmetic                             to know what a figure means
"""
