"""What others have published and a run can start from: InternVL3, DC-AE and SANA as folders, OpenMoji's glyphs as data.
Open it when you have such a folder; README.md beside this file has the commands. All of it needs optional extras.

    names       the names of weights, ours and theirs, in one table           to see that our modules are theirs
    folders     sizes from config.json, every weight checked, P1 to P3        when a folder is refused
    qwen        InternVL3's text tokenizer and its templates                  to see what such a run reads
    export      what was trained, back into folders that others load          to use a run elsewhere
    perceptual  VGG16 with LPIPS's heads, and ConvNeXt-S                      to judge reconstructions as the paper does
    writers     pictures as the official evaluators want them                 to compare with the paper
    openmoji    a picture set, made from a font                               as an example of data on disk
"""
