#!/usr/bin/env python3
"""Writes a GGUF file of random weights in a known model's shape, for figures of speed and memory.

    pip install gguf numpy
    scripts/make_shape.py 0.5b shape-0.5b.gguf
    llama-quantize shape-0.5b.gguf shape-0.5b.Q4_K_M.gguf Q4_K_M

Shapes: 0.5b (Qwen2.5-0.5B: tied embedding) and 8b-4 (Llama-3-8B cut to 4 layers). The vocabulary is made up: byte-level
tokens, each but the first 256 joined from two others by a merge, so that a tokenizer has as much to hold as the model's own.
"""

import argparse
import random

import gguf
import numpy as np

SHAPES = {
    "0.5b": dict(arch="qwen2", pre="qwen2", layers=24, width=896, heads=14, kv_heads=2, inner=4864, vocab=151936, tied=True),
    "8b-4": dict(arch="llama", pre="llama-bpe", layers=4, width=4096, heads=32, kv_heads=8, inner=14336, vocab=128256, tied=False),
    # Small enough to try the script with.
    "tiny": dict(arch="qwen2", pre="qwen2", layers=2, width=256, heads=4, kv_heads=2, inner=512, vocab=1024, tied=True),
}


def byte_tokens():
    """The characters that byte-level vocabularies write bytes with."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + at) for at in range(len(others))]


def vocabulary(size):
    """Tokens and merges. Tokens are joined from short ones, so that lengths are about those of a real vocabulary."""
    draw = random.Random(7)
    tokens, merges = byte_tokens(), []
    known, short = set(tokens), list(tokens)
    while len(tokens) < size - 2:
        left, right = draw.choice(short), draw.choice(short)
        if left + right not in known:
            known.add(left + right)
            tokens.append(left + right)
            merges.append(f"{left} {right}")
            if len(left + right) < 5 and len(short) < 4000:
                short.append(left + right)
    return tokens + ["<|endoftext|>", "<|im_end|>"], merges


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", help="the file to write, in f16")
    args = parser.parse_args()
    shape = SHAPES[args.shape]
    width, inner, vocab = shape["width"], shape["inner"], shape["vocab"]
    head = width // shape["heads"]
    writer = gguf.GGUFWriter(args.out, shape["arch"])
    writer.add_name(f"random weights, {args.shape}")
    writer.add_block_count(shape["layers"])
    writer.add_context_length(8192)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_count(head)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    tokens, merges = vocabulary(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(shape["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (vocab - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(vocab - 1)
    writer.add_bos_token_id(vocab - 2)
    writer.add_add_bos_token(False)

    random_numbers = np.random.default_rng(7)

    def matrix(name, rows, columns):
        weights = random_numbers.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        writer.add_tensor(name, weights.astype(np.float16))

    def vector(name, length, value):
        writer.add_tensor(name, np.full(length, value, dtype=np.float32))

    matrix("token_embd.weight", vocab, width)
    vector("output_norm.weight", width, 1.0)
    if not shape["tied"]:
        matrix("output.weight", vocab, width)
    kv = shape["kv_heads"] * head
    for layer in range(shape["layers"]):
        name = f"blk.{layer}."
        vector(name + "attn_norm.weight", width, 1.0)
        vector(name + "ffn_norm.weight", width, 1.0)
        for part, rows, columns in [
            ("attn_q", width, width), ("attn_k", kv, width), ("attn_v", kv, width), ("attn_output", width, width),
            ("ffn_gate", inner, width), ("ffn_up", inner, width), ("ffn_down", width, inner),
        ]:
            matrix(f"{name}{part}.weight", rows, columns)
            if shape["arch"] == "qwen2" and part in ("attn_q", "attn_k", "attn_v"):
                vector(f"{name}{part}.bias", rows, 0.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=True)
    writer.close()


if __name__ == "__main__":
    main()
