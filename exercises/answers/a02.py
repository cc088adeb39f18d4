"""Exercise 2: who learns when."""


def row(name: str, trains: str, losses: str) -> dict:
    return {"train.py": {f"STAGES.{name}": f"{trains}\n{losses}"}}


WITH_DECODER = 'STREAMS | {"tokenizer.decoder": 1.0}'
WITH_ENCODER = 'STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision": "encoder_rate"}'
T1 = 'RECONSTRUCTION | {"L_p": "lambda_p"}'
T3 = 'RECONSTRUCTION | {"L_s": "lambda_s", "L_gan": "lambda_gan"}'
U1 = '{"L_fm": 1.0}'

WRONG = {
    "U1: of the router what DTR has, of the other routers not all": row("U1",
        '{"mllm.queries": 1.0, "mllm.router.gate": 1.0, "mllm.router.alpha": 1.0, "mllm.router.norm": 1.0, '
        '"mllm.router.W_p": 1.0, "mllm.connector": 1.0}', '{"L_fm": 1.0}'),
    "T1: the streams' parts by their number, as many as a small model has": row("T1",
        '{f"tokenizer.{s}_stream.{i}": 1.0 for s in ("semantic", "pixel") for i in range(3)} | '
        '{"tokenizer.fusion": 1.0}', T1),
    "T3: the encoder's layers by their number, as many as a small model has": row("T3",
        WITH_DECODER[:-1] + ', **{f"tokenizer.vision.{part}": "encoder_rate" for part in '
        '("patches", "cls", "positions", "layers.0", "projector")}}',
        'RECONSTRUCTION | {"L_s": "lambda_s", "L_gan": "lambda_gan"}'),
    "T2: the adversary, by the share of steps at which it joins": row("T2", WITH_DECODER,
        'RECONSTRUCTION | {"L_gan": "gan_start"}'),
    "T1: the decoder, at a field that is 0 by chance": row("T1", 'STREAMS | {"tokenizer.decoder": "gan_start"}', T1),
    "U1: L_fm by a field that is 1 by chance": row("U1", "CONNECTOR", '{"L_fm": "noises_per_picture"}'),
    "U1: the connector at a field that is 1 by chance": row("U1",
        'CONNECTOR | {"mllm.connector": "connector_layers"}', '{"L_fm": 1.0}'),
    "T1 trains the decoder, by a name that there is not": row("T1", 'STREAMS | {"decoder": 1.0}', T1),
    "T2 trains the encoder, by a name that there is not": row("T2",
        WITH_DECODER[:-1] + ', "tokenizer.encoder": "encoder_rate"}', "RECONSTRUCTION"),
    "U2 trains the LLM, by a name that there is not": row("U2", 'GENERATOR | {"llm": 1.0}', "GENERATION"),
    "U2 at a rate that is 1 by chance, and L_fm weighed so": {"train.py": {
        "STAGES.U2": 'CONNECTOR | {"dit": "lambda_p", "align_head": "clip"}\n'
                     '{"L_fm": "encoder_rate", "L_align": "lambda_a"}'}},
    "a field that there is not": {"train.py": {
        "STAGES.T1": 'STREAMS\nRECONSTRUCTION | {"L_p": "lambda_P"}'}},
    "T1 trains the decoder": row("T1", WITH_DECODER, T1),
    "T1 trains the encoder": row("T1", 'STREAMS | {"tokenizer.vision": "encoder_rate"}', T1),
    "T1 forgets the fusion": row("T1", '{"tokenizer.semantic_stream": 1.0, "tokenizer.pixel_stream": 1.0}', T1),
    "T1 trains the pixel stream alone, as L_p is the pixel stream's":
        row("T1", '{"tokenizer.pixel_stream": 1.0, "tokenizer.fusion": 1.0}', T1),
    "T1 without L_p": row("T1", "STREAMS", "RECONSTRUCTION"),
    "T1 with L_p alone": row("T1", "STREAMS", '{"L_p": "lambda_p"}'),
    "T1 with L_s": row("T1", "STREAMS", T1 + ' | {"L_s": "lambda_s"}'),
    "T1 with the adversary": row("T1", "STREAMS", T1 + ' | {"L_gan": "lambda_gan"}'),
    "T1 trains the pixel encoder, which makes L_p's target": row("T1", 'STREAMS | {"pixel_encoder": 1.0}', T1),
    "T1 has the paper's λ_p, not the configuration's": row("T1", "STREAMS", 'RECONSTRUCTION | {"L_p": 1.0}'),
    "T1: L_p with the weight of L_f": row("T1", "STREAMS", 'RECONSTRUCTION | {"L_p": "lambda_f"}'),
    "T2 trains the encoder": row("T2", WITH_ENCODER, "RECONSTRUCTION"),
    "T2 trains the decoder alone": row("T2", '{"tokenizer.decoder": 1.0}', "RECONSTRUCTION"),
    "T2 trains the streams alone, as T1": row("T2", "STREAMS", "RECONSTRUCTION"),
    "T2 keeps L_p": row("T2", WITH_DECODER, T1),
    "T2 with L_s, which is 0 where the encoder is frozen":
        row("T2", WITH_DECODER, 'RECONSTRUCTION | {"L_s": "lambda_s"}'),
    "T2 with the adversary": row("T2", WITH_DECODER, 'RECONSTRUCTION | {"L_gan": "lambda_gan"}'),
    "T2 without L_lpips": row("T2", WITH_DECODER, '{"L_mse": "lambda_mse", "L_f": "lambda_f"}'),
    "T2 without L_f": row("T2", WITH_DECODER, '{"L_mse": "lambda_mse", "L_lpips": "lambda_lpips"}'),
    "T3 without the projector": row("T3",
        'STREAMS | {"tokenizer.decoder": 1.0, **{f"tokenizer.vision.{part}": "encoder_rate" for part in '
        '("patches", "cls", "positions", "layers")}}', T3),
    "T3 with the projector alone": row("T3",
        'STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision.projector": "encoder_rate"}', T3),
    "T3: the encoder at the whole rate": row("T3", '{"tokenizer": 1.0}', T3),
    "T3: the paper's tenth, whatever the configuration says":
        row("T3", 'STREAMS | {"tokenizer.decoder": 1.0, "tokenizer.vision": 0.1}', T3),
    "T3: everything at the encoder's rate": row("T3", '{"tokenizer": "encoder_rate"}', T3),
    "T3: the decoder is frozen again": row("T3", 'STREAMS | {"tokenizer.vision": "encoder_rate"}', T3),
    "T3 trains the encoder alone": row("T3", '{"tokenizer.vision": "encoder_rate"}', T3),
    "T3 without L_s": row("T3", WITH_ENCODER, 'RECONSTRUCTION | {"L_gan": "lambda_gan"}'),
    "T3 without the adversary": row("T3", WITH_ENCODER, 'RECONSTRUCTION | {"L_s": "lambda_s"}'),
    "T3 keeps L_p": row("T3", WITH_ENCODER, T3 + ' | {"L_p": "lambda_p"}'),
    "T3: L_s with the weight of L_gan": row("T3", WITH_ENCODER,
        'RECONSTRUCTION | {"L_s": "lambda_gan", "L_gan": "lambda_s"}'),
    "T3 trains the LLM, as it reads what moves": row("T3", WITH_ENCODER[:-1] + ', "mllm.llm": "encoder_rate"}', T3),
    "U1 trains the DiT": row("U1", 'CONNECTOR | {"dit": 1.0}', U1),
    "U1 trains all of the language side": row("U1", '{"mllm": 1.0}', U1),
    "U1 forgets the queries": row("U1", '{"mllm.router": 1.0, "mllm.connector": 1.0}', U1),
    "U1 forgets the router": row("U1", '{"mllm.queries": 1.0, "mllm.connector": 1.0}', U1),
    "U1 trains all but the connector's way out": row("U1",
        '{"mllm.queries": 1.0, "mllm.router": 1.0, "mllm.connector.layers": 1.0, "mllm.connector.norm": 1.0, '
        '"mllm.connector.share": 1.0}', U1),
    "U1 with L_align": row("U1", "CONNECTOR", "GENERATION"),
    "U1 with L_align and its head": row("U1", 'CONNECTOR | {"align_head": 1.0}', "GENERATION"),
    "U2 trains the LLM": row("U2", 'GENERATOR | {"mllm.llm": 1.0}', "GENERATION"),
    "U2 trains the encoder": row("U2", 'GENERATOR | {"tokenizer.vision": 1.0}', "GENERATION"),
    "U2 keeps the DiT frozen": row("U2", 'CONNECTOR | {"align_head": 1.0}', "GENERATION"),
    "U2 forgets φ_a": row("U2", 'CONNECTOR | {"dit": 1.0}', "GENERATION"),
    "U2 trains the DiT alone": row("U2", '{"dit": 1.0, "align_head": 1.0}', "GENERATION"),
    "U2 without L_align": row("U2", "GENERATOR", U1),
    "U2 with L_align alone": row("U2", "GENERATOR", '{"L_align": "lambda_a"}'),
    "U2: L_align as heavy as L_fm": row("U2", "GENERATOR", '{"L_fm": 1.0, "L_align": 1.0}'),
    "U2: L_fm and L_align share the weight": row("U2", "GENERATOR", '{"L_fm": "lambda_a", "L_align": "lambda_a"}'),
    "U3 trains the LLM, as fine-tuning does elsewhere": row("U3", 'GENERATOR | {"mllm.llm": 1.0}', "GENERATION"),
    "U3 trains the connector alone": row("U3", "CONNECTOR", "GENERATION"),
    "U3 without L_align": row("U3", "GENERATOR", U1),
    "U3 trains the decoder": row("U3", 'GENERATOR | {"tokenizer.decoder": 1.0}', "GENERATION"),
}

RIGHT = {
    "T1 to T3 written out, term by term": {"train.py": {
        "STAGES.T1": '{"tokenizer.fusion": 1.0, "tokenizer.pixel_stream": 1.0, "tokenizer.semantic_stream": 1.0}\n'
                     '{"L_p": "lambda_p", "L_f": "lambda_f", "L_lpips": "lambda_lpips", "L_mse": "lambda_mse"}',
        "STAGES.T2": 'dict(STREAMS, **{"tokenizer.decoder": 1})\ndict(RECONSTRUCTION)',
        "STAGES.T3": f'{{**{WITH_DECODER.replace(" | ", ", **")}, "tokenizer.vision": "encoder_rate"}}\n'
                     '{**RECONSTRUCTION, "L_s": "lambda_s", "L_gan": "lambda_gan"}'}},
    "the projector by itself": row(
        "T3", WITH_ENCODER.replace("}", ', "tokenizer.vision.projector": "encoder_rate"}'), T3),
    "finer prefixes that cover the same": {"train.py": {
        "STAGES.T3": 'STREAMS | {"tokenizer.decoder": 1.0, **{f"tokenizer.vision.{part}": "encoder_rate" for part in '
                     '("patches", "cls", "positions", "layers", "projector")}}\n' + T3,
        "STAGES.U1": '{"mllm.queries": 1.0, "mllm.router": 1.0, "mllm.connector.layers": 1.0, "mllm.connector.norm": '
                     '1.0, "mllm.connector.share": 1.0, "mllm.connector.out": 1.0}\n{"L_fm": 1}'}},
    "wider prefixes, with what stays at rate 0": {"train.py": {
        "STAGES.T1": '{"tokenizer": 1.0, "tokenizer.decoder": 0.0, "tokenizer.vision": 0.0}\n' + T1,
        "STAGES.T2": '{"tokenizer": 1.0, "tokenizer.vision": 0.0}\nRECONSTRUCTION',
        "STAGES.T3": '{"tokenizer": 1.0, "tokenizer.vision": "encoder_rate"}\n' + T3,
        "STAGES.U2": '{"mllm": 1.0, "mllm.llm": 0, "dit": 1.0, "align_head": 1.0}\nGENERATION'}},
    "terms with weight 0": {"train.py": {
        "STAGES.T2": WITH_DECODER + '\nRECONSTRUCTION | {"L_p": 0.0, "L_s": 0.0, "L_gan": 0.0}',
        "STAGES.U1": 'CONNECTOR\n{"L_fm": 1.0, "L_align": 0.0}'}},
    "U2 and U3 written out": {"train.py": {
        f"STAGES.{name}": '{"dit": 1.0, "align_head": 1.0, "mllm.queries": 1.0, "mllm.router": 1.0, "mllm.connector": '
                          '1.0}\n{"L_align": "lambda_a", "L_fm": 1.0}' for name in ("U2", "U3")}},
}
