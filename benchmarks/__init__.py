"""What it costs, forecast and measured. Nothing here is in the paper.

    cost         memory and arithmetic of a stage; its steps, timed    python train.py --plan, --bench
    look         held-out losses and pictures while a stage goes on      python train.py --look-minutes 60
    yardstick    how fast the machine was while a run trained          in results.json
    attention    our fused kernels against torch's own attention       python attention.py --bench, on a GPU
    gpu          everything that needs a GPU, in three parts           python benchmarks/gpu.py --part 1
    modules      our modules against the public ones, on CPU           python benchmarks/modules.py
"""
