"""Write a Llama or GPT-2 folder with random weights as GGUF; its words are t0, t1 …, as only ids go in and out.

    build/peers/llama_cpp/bin/python benchmarks/peers/gguf_file.py MODEL OUT TYPE    (F32 F16 BF16 Q8_0 Q4_0)

Every matrix has the type that is named, as llama-quantize --pure makes them; vectors stay in float32.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

LLAMA = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GPT2 = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output", "ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def main() -> None:
    """Write the file."""
    folder, path, kind = Path(sys.argv[1]), Path(sys.argv[2]), gguf.GGMLQuantizationType[sys.argv[3]]
    config = json.loads((folder / "config.json").read_text())
    family = config["model_type"]
    writer = gguf.GGUFWriter(path, family)
    write_settings(writer, family, config)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if kind.name == 'F32' else 'MOSTLY'}_{kind.name}"])
    for name, tensor in convert(load_file(folder / "model.safetensors"), family, config):
        tensor = np.ascontiguousarray(tensor, np.float32)
        wanted = kind if tensor.ndim == 2 and name != "position_embd.weight" else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_settings(writer: Any, family: str, config: dict[str, Any]) -> None:
    """Write the numbers that describe the network."""
    llama = family == "llama"
    width = config["hidden_size" if llama else "n_embd"]
    heads = config["num_attention_heads" if llama else "n_head"]
    writer.add_context_length(config["max_position_embeddings" if llama else "n_positions"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers" if llama else "n_layer"])
    writer.add_head_count(heads)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(config["vocab_size"])])
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if llama:
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_dimension_count(width // heads)
        writer.add_rope_freq_base(float((config.get("rope_parameters") or config)["rope_theta"]))
    else:
        writer.add_feed_forward_length(config.get("n_inner") or 4 * width)
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def convert(tensors: dict[str, Any], family: str, config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield llama.cpp's names and tensors: GPT-2's matrices transposed, Llama's query and key rows interleaved."""
    table = LLAMA if family == "llama" else GPT2
    for key, tensor in tensors.items():
        stem, _, kind = key.rpartition(".")
        parts = stem.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if layer is None:
            yield f"{table[stem]}.{kind}", tensor
            continue
        name = ".".join(parts[layer + 1 :])
        if family == "gpt2" and tensor.ndim == 2:
            tensor = tensor.T
        if name in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            rows, width = tensor.shape
            tensor = tensor.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
        yield f"blk.{parts[layer]}.{table[name]}.{kind}", tensor


if __name__ == "__main__":
    main()
