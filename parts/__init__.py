"""What any such model is made of. Nothing here is a claim of the paper: open a file when the one you read uses it.

    attention_triton    the algorithm of attention.py as fused GPU kernels     to see a tile kept on the chip
    backend             which backend computes attention, kernels on trial     with --attention
    linear_attention    SANA's and DC-AE's attention, plain and fused          with diffusion.py
    dcae                DC-AE, the pixel autoencoder E_p and D_p               to know what a latent is made by
    adversary           LPIPS's formula, PatchGAN with LeCam                   with T3
    layer               a layer that may forget its insides, RMSNorm, Mix-FFN  when a class derives from Layer
    positions           rotary positions, sines on a grid                      with mllm.py
    shared_batch        means over a batch that several processes share        when a run has several
    words               ids of words, and questions with answers as rows       with P1
    muon                the optimizer of the small presets                     when a run is too slow for AdamW
    metrics             PSNR, SSIM, Fréchet distance                           with evaluate.py
"""
