"""Speed, measured against others. Nothing here is in the paper, and nothing else needs it.

    attention    our fused kernels against torch's own attention       python attention.py --bench, on a GPU
    gpu          everything that needs a GPU, in three parts           python benchmarks/gpu.py --part 1
    modules      our modules against the public ones, on CPU           python benchmarks/modules.py
"""
