"""Pictures of strangers: data on disk in place of the drawn world, read without unpacking or executing anything. Open
it when you bring your own; README.md beside this file says how a folder may look.

    layouts     what a folder holds, found out by looking at it                to see how files become samples
    samples     a sample, a folder of them, and which of them are held out     to see what the others pass around
    index       where the samples of millions lie, so that a start is short    when a start takes long
    files       one picture, text, record or shard, and what is wrong with it  when a file is refused
    reading     the order of samples, and a sample as tensors                  how training reads them
    bytepair    the vocabulary that a run learns from its texts                when words are not the drawn world's
    check       python data.py --check and --build-vocab                       before training
    measure     every figure of such a run, beside a trivial baseline          with evaluate.py
"""
