"""Runs in llama.cpp's environment: token ids of texts, and logits or embeddings of token ids, by the low-level interface.

The job is a JSON list: ``{"gguf": file, "texts": [...], "tokens": [...], "embeddings": bool, "npy": file}``.
"""

import argparse
import ctypes
import json

import llama_cpp
import numpy as np


def tokens_of(vocab, text, *, add_special, parse_special):
    data = text.encode("utf-8", "surrogateescape")
    size = len(data) + 16
    buffer = (llama_cpp.llama_token * size)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), buffer, size, add_special, parse_special)
    assert count >= 0, count
    return list(buffer[:count])


def evaluate(model, tokens, *, embeddings):
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(32, len(tokens))
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.embeddings = embeddings
    if embeddings:
        params.pooling_type = llama_cpp.LLAMA_POOLING_TYPE_NONE
    context = llama_cpp.llama_init_from_model(model, params)
    assert context
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    run = (
        llama_cpp.llama_encode
        if embeddings and not llama_cpp.llama_model_has_decoder(model)
        else llama_cpp.llama_decode
    )
    assert run(context, batch) == 0
    vocab = llama_cpp.llama_model_get_vocab(model)
    width = llama_cpp.llama_model_n_embd(model) if embeddings else llama_cpp.llama_vocab_n_tokens(vocab)
    get = llama_cpp.llama_get_embeddings_ith if embeddings else llama_cpp.llama_get_logits_ith
    rows = [np.ctypeslib.as_array(get(context, place), shape=(width,)).copy() for place in range(len(tokens))]
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    return np.stack(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("job")
    parser.add_argument("--json", required=True)
    options = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    answers = []
    with open(options.job, encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = "npy" not in job
        params.use_extra_bufts = False
        model = llama_cpp.llama_model_load_from_file(job["gguf"].encode(), params)
        assert model, f"{job['gguf']} is refused"
        vocab = llama_cpp.llama_model_get_vocab(model)
        special = job.get("special", False)
        ids = [tokens_of(vocab, text, add_special=special, parse_special=True) for text in job.get("texts", [])]
        if "npy" in job:
            np.save(job["npy"], evaluate(model, job["tokens"], embeddings=job.get("embeddings", False)))
        answers.append({"ids": ids})
        llama_cpp.llama_model_free(model)
    with open(options.json, "w", encoding="utf-8") as file:
        json.dump({"answers": answers}, file)


if __name__ == "__main__":
    main()
